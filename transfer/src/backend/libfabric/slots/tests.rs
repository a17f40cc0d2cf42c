use super::*;

#[test]
fn slots_are_found_by_the_address_of_their_words_alone() {
    let mut slots = Slots::new();
    let taken: Vec<_> = (0..CHUNK + 3).map(|value| slots.take(value).unwrap()).collect();
    for (value, slot) in taken.iter().enumerate() {
        assert_eq!(slots.find(slots.context(*slot)), Some(*slot));
        assert_eq!(slots.get(*slot), Some(&value));
    }
    let first = slots.context(taken[0]);
    assert_eq!(slots.find(std::ptr::null_mut()), None);
    assert_eq!(slots.find(first.wrapping_byte_add(8)), None, "within the words of a slot");
    assert_eq!(slots.find(first.wrapping_byte_sub(64)), None, "before all of them");
    assert_eq!(slots.give_back(taken[0]), Some(0));
    assert_eq!(slots.find(first), None, "not in use");
    assert_eq!(slots.give_back(taken[0]), None, "given back twice");
}

#[test]
fn slots_are_reused_oldest_first_and_are_not_endless() {
    let mut slots = Slots::new();
    let first = slots.take(1).unwrap();
    slots.give_back(first);
    assert_ne!(slots.take(2), Some(first), "reused at once");
    let mut count = 1;
    while slots.take(3).is_some() {
        count += 1;
    }
    assert_eq!((count, slots.available()), (CHUNK * CHUNKS_MAX, 0));
    assert_eq!(slots.matching(|value| *value == 2).len(), 1);
}
