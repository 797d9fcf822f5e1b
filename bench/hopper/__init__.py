"""The attention kernels for Hopper without a GPU: what is compiled, what the compiler says, what follows for speed."""
