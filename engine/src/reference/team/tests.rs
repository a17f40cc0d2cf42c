use super::*;

#[test]
fn every_item_is_visited_once_with_its_index() {
    for threads in [1, 2, 5] {
        let team = Team::start(threads).unwrap();
        for operations in [0, 1000, 10 * GRAIN] {
            let mut items = vec![0_usize; 37];
            team.run(|| team.each(&mut items, operations, |i, item| *item += i + 1));
            assert!(items.iter().enumerate().all(|(i, item)| *item == i + 1), "{threads} threads");
            let mut data = vec![0_usize; 37];
            team.run(|| team.chunks(&mut data, 5, operations, |i, chunk| chunk.fill(i + 1)));
            assert!(data.iter().enumerate().all(|(i, x)| *x == i / 5 + 1), "{threads} threads");
        }
    }
}

#[test]
fn small_work_stays_on_the_calling_thread() {
    let team = Team::start(4).unwrap();
    team.run(|| {
        let caller = std::thread::current().id();
        team.each(&mut [(); 8], GRAIN / 100, |_, ()| assert_eq!(std::thread::current().id(), caller));
    });
}
