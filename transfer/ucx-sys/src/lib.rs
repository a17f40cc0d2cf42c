//! Hand-kept bindings of UCX, opened at run time: only what Baton's transfers use.
