//! AWS Neuron device memory through libnrt, opened at run time.
