//! Requests that go on and on while something is broken: each answer must be right, and none may fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::client::{Answer, Client, Prompt};
use crate::scenario::ask;

/// Clients that ask at the same time.
const CLIENTS: usize = 3;

/// A running load.
pub struct Load {
    stop: CancellationToken,
    answered: Arc<AtomicUsize>,
    clients: JoinSet<()>,
}

impl Load {
    /// Asks for `prompts` in turn, over and over, and compares each answer with the expected one.
    ///
    /// # Panics
    /// When there are not as many answers as prompts.
    pub fn start(client: &Client, prompts: &[Prompt], expected: &[Answer]) -> Self {
        assert_eq!(prompts.len(), expected.len());
        let (stop, answered) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
        let mut clients = JoinSet::new();
        for first in 0..CLIENTS {
            let (client, stop, answered) = (client.clone(), stop.clone(), Arc::clone(&answered));
            let pairs: Vec<(Prompt, Answer)> =
                prompts.iter().cloned().zip(expected.iter().cloned()).collect();
            clients.spawn(async move {
                for (prompt, want) in pairs.iter().cycle().skip(first * pairs.len() / CLIENTS) {
                    if stop.is_cancelled() {
                        return;
                    }
                    let got = ask(&client, prompt).await;
                    assert_eq!(want.proof(), got.proof(), "{:?}", got.baton);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { stop, answered, clients }
    }

    /// Good answers so far.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends the load and says how many answers there were, all of them right.
    ///
    /// # Panics
    /// When a request failed or an answer was wrong; the client's own message is shown.
    pub async fn finish(mut self) -> usize {
        self.stop.cancel();
        while let Some(ended) = self.clients.join_next().await {
            if let Err(error) = ended {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        self.answered()
    }
}
