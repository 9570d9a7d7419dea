"""The run viewer: runs read from their folders while they grow, served to a browser on this machine or as one file."""
