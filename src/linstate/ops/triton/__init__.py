"""Backend ``triton``: programs for CUDA devices, and for Triton's interpreter in tests (``docs/kernels-gpu.md``).

``kernels/`` has the programs, ``table.py`` how they are cut for a shape, and the modules beside it what stands between them
and the backend table.
"""
