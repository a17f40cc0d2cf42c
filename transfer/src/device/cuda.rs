//! NVIDIA GPU memory through the CUDA driver, opened at run time.
