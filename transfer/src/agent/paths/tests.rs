use super::survey::rank;
use super::*;

fn measured(latency_us: u64, gb_per_s: f64) -> Option<Measured> {
    Some(Measured { latency: Duration::from_micros(latency_us), bytes_per_second: gb_per_s * 1e9 })
}

#[test]
fn the_listed_order_stands_unless_a_later_path_is_clearly_quicker() {
    // A typical read of 4 MiB: 1 ms and 0.8 ms are close, 0.5 ms is not.
    let (slow, close, quick) = (measured(1, 4.2), measured(1, 5.25), measured(1, 8.4));
    assert_eq!(rank(&[slow, close]), [0, 1]);
    assert_eq!(rank(&[slow, quick]), [1, 0]);
    assert_eq!(rank(&[quick, slow, close]), [0, 1, 2]);
    assert_eq!(rank(&[slow, close, quick]), [2, 0, 1]);
}

#[test]
fn what_was_not_measured_keeps_its_place() {
    let (slow, quick) = (measured(100, 1.0), measured(1, 8.4));
    assert_eq!(rank(&[None, quick]), [0, 1]);
    assert_eq!(rank(&[slow, None, quick]), [2, 0, 1]);
    assert_eq!(rank(&[]), [] as [usize; 0]);
}

#[test]
fn a_broken_path_is_named_only_where_there_is_no_other() {
    let broken = || Stage::Broken { until: Instant::now(), why: "cut".to_owned(), verdict: None };
    let chosen_of = |stages: &[Stage], order: &[usize]| chosen(order, |index| &stages[index]);
    assert_eq!(chosen_of(&[broken(), Stage::Unopened, Stage::Opening], &[0, 1, 2]), Some(1));
    assert_eq!(chosen_of(&[broken(), Stage::Unopened, Stage::Opening], &[0, 2, 1]), Some(2));
    assert_eq!(chosen_of(&[broken(), broken()], &[1, 0]), Some(1));
    assert_eq!(chosen_of(&[], &[]), None);
}
