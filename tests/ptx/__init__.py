"""An interpreter of PTX, so that the CUDA kernels run where there is no GPU: slowly, in any order, and with every address looked at.

`program.py` reads PTX, `lanes.py` says what an instruction does to 32 lanes, `tiles.py` what the matrix instructions and TMA's boxes
do, `gpu.py` what a warp, a block and a cluster are and in which order they run. What a GPU does later (TMA's copies, `st.async`) is
done at a time that is drawn; what the matrix units read must not change while they may be reading it. It knows the instructions
that the kernels have, and nothing of caches, of time, or of writes that another proxy does not see yet.
"""
