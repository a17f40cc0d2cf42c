//! The libfabric driver: EFA and every other provider with reliable datagrams and one-sided operations.
