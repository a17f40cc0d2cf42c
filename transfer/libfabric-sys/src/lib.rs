//! Hand-kept bindings of libfabric, opened at run time: only what Baton's transfers use.
