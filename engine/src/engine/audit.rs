//! Checks that every block has one state and one owner.

/// A discrepancy between what the engine, its pool and its sequences say: a bug.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuditError {
    /// The states do not add up to the pool.
    #[error("block states add up to {counted} of {total} blocks")]
    Sum {
        /// Sum of the states.
        counted: u32,
        /// Blocks of the pool.
        total: u32,
    },
}
