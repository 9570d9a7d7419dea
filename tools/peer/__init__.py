"""Parts of `tools/peer_trl.py`: two trainers in processes of their own that take turns."""
