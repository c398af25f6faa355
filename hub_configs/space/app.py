"""The demo as a Space; the package lies beside this file. `MODEL` may name another model than the bundled one."""

import os

from diffusers_localdit.demo import HOST, serve

# A Space's container says that it listens on all of its addresses; anywhere else it is this machine alone.
serve(os.environ.get("MODEL", "localdit-shapes"), host=os.environ.get("GRADIO_SERVER_NAME", HOST))
