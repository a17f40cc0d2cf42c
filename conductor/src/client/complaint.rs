//! What a process has complained about, so that it says each thing once and not with every retry.

use std::collections::BTreeSet;

/// Complaints remembered; more kinds than that at once are not told apart.
const KINDS_MAX: usize = 16;

/// What has been said since things last went well.
#[derive(Debug, Default)]
pub(crate) struct Complaints(BTreeSet<String>);

impl Complaints {
    /// Whether this was not said before.
    pub(crate) fn is_news(&mut self, complaint: &str) -> bool {
        self.0.len() < KINDS_MAX && self.0.insert(complaint.to_owned())
    }

    /// Things go well; true if there was something to complain about.
    pub(crate) fn settle(&mut self) -> bool {
        !std::mem::take(&mut self.0).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_complaint_is_said_once_until_things_go_well() {
        let mut complaints = Complaints::default();
        assert!(!complaints.settle());
        assert!(complaints.is_news("a") && complaints.is_news("b"));
        assert!(!complaints.is_news("a") && !complaints.is_news("b"), "two endpoints fail in turn");
        assert!(complaints.settle() && complaints.is_news("a"));
        assert_eq!((0..100).filter(|n| complaints.is_news(&n.to_string())).count(), KINDS_MAX - 1);
    }
}
