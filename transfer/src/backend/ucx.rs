//! The UCX driver: RDMA, GPU memory and every other transport UCX knows.
