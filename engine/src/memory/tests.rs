use super::*;

#[test]
fn any_range_reads_back_and_leaves_its_neighbours_alone() {
    const LEN: usize = 41;
    for offset in 0..LEN {
        for len in 0..=LEN - offset {
            let memory = HeapMemory::new(LEN);
            let mut model: Vec<u8> = (0..LEN as u8).map(|b| b ^ 0xa5).collect();
            memory.write(0, &model);
            let patch: Vec<u8> = (0..len).map(|i| (offset * 31 + i) as u8).collect();
            memory.write(offset, &patch);
            model[offset..offset + len].copy_from_slice(&patch);
            let mut whole = vec![0; LEN];
            memory.read(0, &mut whole);
            assert_eq!(whole, model, "{len} bytes at {offset}");
            let mut part = vec![0; len];
            memory.read(offset, &mut part);
            assert_eq!(part, patch);
        }
    }
}

#[test]
fn two_threads_writing_halves_of_the_same_words_lose_nothing() {
    let memory = HeapMemory::new(4096);
    std::thread::scope(|scope| {
        for half in 0..2 {
            let memory = &memory;
            scope.spawn(move || {
                for at in (half * 4..4096).step_by(8) {
                    memory.write(at, &[half as u8 + 1; 4]);
                }
            });
        }
    });
    let mut all = vec![0; 4096];
    memory.read(0, &mut all);
    assert!(all.chunks(8).all(|word| word == [1, 1, 1, 1, 2, 2, 2, 2]));
}

#[test]
#[should_panic(expected = "do not lie within")]
fn a_range_beyond_the_end_is_a_bug() {
    HeapMemory::new(16).read(10, &mut [0; 7]);
}
