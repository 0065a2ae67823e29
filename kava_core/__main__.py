"""Run kava as ``python -m kava_core``, for launchers: ``torchrun -m kava_core train spec.yaml``."""

from kava_core.cli.app import main

main()
