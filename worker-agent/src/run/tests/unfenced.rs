//! Transfers that do not end when they are told to.

use std::time::Duration;

use baton_config::protocol::{FailureCode, GenerateRequest};
use baton_config::{HandoffId, Role};

use super::fleet::{Fleet, PATIENCE, Running, Setup, prompt, until};
use super::frames::Wire;
use crate::options::{DeviceKind, DeviceOptions};

/// A decode worker with a device that takes two seconds for a block, and has none to end a transfer.
fn slow(fleet: &Fleet) -> Running {
    fleet.worker("d-0", Role::Decode, |it| {
        let bytes_per_s = Some(it.arena.geometry.block_bytes() as u64 / 2);
        let kind = DeviceKind::Simulated { bytes_per_s, reachable: false };
        it.arena.device = Some(DeviceOptions { kind, direct: false });
        it.handoff.abort_max = Duration::from_millis(50);
    })
}

/// Done while the first block of a handoff is being copied; on a busy machine perhaps a moment too early.
async fn while_it_is_copied(d: &Running, id: u128) {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let status = d.handoffs().status(HandoffId(id)).await;
        if status.is_ok_and(|status| status.phase.starts_with("decode/importing")) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "never imported");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
}

#[test]
fn a_request_whose_transfer_does_not_end_fails_and_its_blocks_come_back_once_it_has() {
    let fleet = Fleet::start(Setup { blocks: 32, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), slow(&fleet));
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 60, fleet.vocab()), 4);
        let mut wire = Wire::connect(&d, d.epoch()).await.unwrap();
        let (mut failed_in_lines, mut failed_in_frames) = (false, false);
        for id in 1..20_u32 {
            let (of, by_frames) = (u128::from(id), !id.is_multiple_of(2));
            let _prefill = fleet.start_prefill(&p, &d, &request, of);
            let asks: GenerateRequest = fleet.generate_with(&d, &p, &request, of);
            let failed = if by_frames {
                wire.open(id, 100, &asks).await;
                while_it_is_copied(&d, of).await;
                fleet.delete(&d, of).await;
                wire.read_until(|got| {
                    got.get(&id).is_some_and(|got| got.failed.is_some() || got.finished.is_some())
                })
                .await;
                wire.got[&id].failed == Some(FailureCode::Engine)
            } else {
                let lines = fleet.start_post(d.address(), "/v1/generate", &asks);
                while_it_is_copied(&d, of).await;
                fleet.delete(&d, of).await;
                let lines = tokio::time::timeout(PATIENCE, lines).await.expect("it ends");
                lines.unwrap().unwrap().contains("a transfer could not be confirmed to have ended")
            };
            if failed {
                assert!(d.in_use() > 0, "a copy under way may still write its block");
            }
            match by_frames {
                true => failed_in_frames |= failed,
                false => failed_in_lines |= failed,
            }
            until("all blocks back", || p.in_use() == 0 && d.in_use() == 0 && d.in_flight() == 0).await;
            if failed_in_lines && failed_in_frames {
                break;
            }
        }
        assert!(failed_in_lines && failed_in_frames, "{failed_in_lines} {failed_in_frames}");
        d.audit().await;
        p.audit().await;
    });
}

#[test]
fn a_client_that_leaves_while_its_blocks_are_copied_leaves_nothing_behind() {
    let fleet = Fleet::start(Setup { blocks: 32, ..Setup::sim() });
    let (p, d) = (fleet.prefill("p-0"), slow(&fleet));
    fleet.block_on(async {
        let request = fleet.request(prompt(1, 60, fleet.vocab()), 4);
        let prefill = fleet.start_prefill(&p, &d, &request, 1);
        let generate = fleet.start_generate(&d, &p, &request, 1);
        while_it_is_copied(&d, 1).await;
        drop((prefill, generate));
        until("all blocks back", || p.in_use() == 0 && d.in_use() == 0 && d.in_flight() == 0).await;
        d.audit().await;
        p.audit().await;
    });
}
