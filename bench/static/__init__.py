"""What can be read of the kernels without a GPU: ahead-of-time compilation, machine code, tile arithmetic."""
