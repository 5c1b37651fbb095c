"""A stand-in for CANN, so that the genuine torch_npu wheel runs on a machine without an Ascend NPU.

    libraries.py    makes the shared libraries with gcc, from the symbols that the installed wheel asks for
    native/         their code: a device whose memory is host memory, and a recorder in the place of every kernel
    machine.py      starts torch_npu on it, as a chip and a CANN version of choice, and reads the recorder
    aten.py         what torch's own operators compute there: the CPU's kernels, on the same memory
    bodies/         what the vendor's fused operators compute, written from their documentation

The vendor's front end is real: schemas, argument checks, allocation of results, choice of the aclnn kernel. What a kernel
computes is ours, and whatever has no body refuses. So a run here says that the calls are right as documented; it says nothing
about the numbers, tiling, speed or collectives of the hardware. Everything it prints calls it "stand-in runtime".
"""
