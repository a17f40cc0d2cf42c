//! Drivers out of tree: loaded from a shared object through a small versioned C ABI.
