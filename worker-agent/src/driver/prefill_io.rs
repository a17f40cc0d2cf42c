//! Actions of the prefill side.

use baton_config::HandoffId;
use baton_config::protocol::Ticket;
use baton_engine::engine::Writers;
use baton_transfer::export::ExportBlock;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Command, Owner, PrefillLeg, delete_at};
use crate::handoff::{PrefillAction, PrefillEvent};

impl Owner {
    pub(super) async fn prefill_action(&mut self, id: HandoffId, action: PrefillAction) {
        let Some(leg) = self.prefills.get_mut(&id) else { return };
        match action {
            PrefillAction::Wanted => self.io.engine.wanted(leg.seq).await,
            PrefillAction::Export { blocks } => {
                let table = &leg.blocks;
                let named =
                    |index: u32| table.get(index as usize).map(|block| ExportBlock { index, block: block.0 });
                let blocks: Option<Vec<ExportBlock>> = blocks.map(named).collect();
                self.export(id, blocks.unwrap_or_default());
            }
            PrefillAction::Post { ticket } => {
                let token = leg.withdrawn.child_token();
                if let Some(older) = leg.posts.insert(ticket.seq, token.clone()) {
                    older.cancel();
                }
                // The handoff is alive, however long its peer has no room: its exports are not forgotten ones.
                self.io.exporter.touch(id);
                self.post(id, ticket, token);
            }
            PrefillAction::ReleaseStaged { blocks } => self.io.exporter.acked(id, blocks),
            PrefillAction::Withdraw => {
                leg.withdrawn.cancel();
                self.io.exporter.release(id).await;
            }
            PrefillAction::ReleaseEngine => self.io.engine.release(leg.seq).await,
            // Nobody but the engine writes the blocks of a prefill.
            PrefillAction::CancelEngine => self.io.engine.cancel(leg.seq, Writers::Gone).await,
            PrefillAction::DeleteAtPeer => {
                let (io, peer) = (self.io.clone(), leg.peer.clone());
                self.io.tasks.spawn(delete_at(io, peer, id));
            }
        }
    }

    fn export(&mut self, id: HandoffId, blocks: Vec<ExportBlock>) {
        let Some(PrefillLeg { epoch, withdrawn, .. }) = self.prefills.get(&id) else { return };
        let deadline = Instant::now() + self.desk.limits().lease;
        // Begins here: whatever withdraws the handoff from now on ends it, however late the task comes to it.
        let publishing = self.io.exporter.publish(id, *epoch, &blocks, deadline);
        self.spawn(withdrawn.clone(), async move {
            let result = publishing.await.map_err(|error| {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "blocks of a handoff could not be offered");
            });
            let result = result.and_then(|offered| if offered.is_empty() { Err(()) } else { Ok(offered) });
            Some(Command::Prefill(id, PrefillEvent::Exported(result)))
        });
    }

    fn post(&mut self, id: HandoffId, ticket: Ticket, token: CancellationToken) {
        let Some(leg) = self.prefills.get(&id) else { return };
        let (io, peer) = (self.io.clone(), leg.peer.clone());
        self.spawn(token, async move {
            let result = io.peers.post_ticket(&io.address_of(&peer), id, &ticket).await;
            Some(Command::Prefill(id, PrefillEvent::Answered { seq: ticket.seq, result }))
        });
    }
}
