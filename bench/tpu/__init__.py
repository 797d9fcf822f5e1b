"""The TPU kernels without a TPU: what the compiler makes of ours and of peers, and what follows for their speed."""
