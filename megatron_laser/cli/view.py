"""`megatron-laser view`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

_MOST_MIB = 2.0**20  # `--max-mib inf` is as good as any number


def view(
    runs: Annotated[
        list[Path], typer.Argument(help="Output folders of one or more runs, also of one that goes on.")
    ],
    port: Annotated[
        int | None,
        typer.Option(help="Port on this machine; 0: any that is free. Default: 8650 or one of the next."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. The default is reached from this machine only, or through SSH."
        ),
    ] = "127.0.0.1",
    export: Annotated[
        Path | None,
        typer.Option(help="Write one self-contained HTML file instead, to open without a server."),
    ] = None,
    responses: Annotated[
        int | None,
        typer.Option(
            min=0, help="Responses of each run in the file: the newest and the most telling. Default: all."
        ),
    ] = None,
    max_mib: Annotated[float, typer.Option(help="Size over which the file is not written.")] = 64.0,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open a browser where there is a display.")
    ] = True,
) -> None:
    """Show runs in a browser: curves, responses token by token, timeline, events and alarms; live while they train."""
    from megatron_laser.cli.options import require_positive
    from megatron_laser.viewer.api import Viewer

    require_positive("--max-mib", max_mib)
    viewer = Viewer(runs)
    try:
        if export is not None:
            from megatron_laser.viewer.export import write_export

            size = write_export(
                viewer, export, responses=responses, max_bytes=int(min(max_mib, _MOST_MIB) * 2**20)
            )
            typer.echo(f"wrote {export}: {size / 2**20:.1f} MiB")
        else:
            _serve(viewer, host, port, open_browser)
    finally:
        viewer.close()


def _serve(viewer: object, host: str, port: int | None, open_browser: bool) -> None:
    import threading

    from megatron_laser.viewer.api import Viewer
    from megatron_laser.viewer.server import ViewerServer

    assert isinstance(viewer, Viewer)
    server = ViewerServer(viewer, host=host, port=port)
    server.start()
    viewer.start()
    typer.echo(f"viewing {', '.join(run.label for run in viewer.runs)} at {server.url}")
    if not server.is_private:
        typer.echo(
            f"{host} is reached by others: whoever has the address reads everything, and nothing is encrypted"
        )
    typer.echo(
        f"From another machine: ssh -L {server.port}:127.0.0.1:{server.port} THIS_MACHINE, then the same address. "
        "Ctrl-C ends it."
    )
    sys.stdout.flush()
    if open_browser and (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin"
    ):
        import webbrowser

        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        typer.echo("")
    finally:
        server.close()
