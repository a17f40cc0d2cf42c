//! A table with keys that are never used twice: what is under way, found by the number that was handed out for it.

/// Values by key. A place is used again, with another key.
#[derive(Debug)]
pub(super) struct Table<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Table<T> {
    pub(super) fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }

    /// Values there are.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(super) fn insert(&mut self, value: T) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, value: None });
            // Bounded operations, batches and peers: far below.
            (self.places.len() - 1) as u32
        });
        let place = &mut self.places[at as usize];
        place.generation = place.generation.wrapping_add(1);
        place.value = Some(value);
        u64::from(place.generation) << 32 | u64::from(at)
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let place = self.places.get_mut(key as u32 as usize)?;
        if place.generation == (key >> 32) as u32 { place.value.as_mut() } else { None }
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let place = self.places.get_mut(key as u32 as usize)?;
        if place.generation != (key >> 32) as u32 {
            return None;
        }
        let value = place.value.take()?;
        self.free.push(key as u32);
        Some(value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let keyed = |(at, place): (usize, &'_ Place<T>)| u64::from(place.generation) << 32 | at as u64;
        self.places
            .iter()
            .enumerate()
            .filter_map(move |(at, place)| Some((keyed((at, place)), place.value.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_finds_its_own_value_and_never_that_of_a_later_one() {
        let mut table = Table::new();
        let first = table.insert("first");
        let second = table.insert("second");
        assert_eq!(table.remove(first), Some("first"));
        let third = table.insert("third");
        assert_ne!(first, third, "the place is used again, the key is not");
        assert_eq!(table.get_mut(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get_mut(third).copied(), Some("third"));
        assert_eq!(table.iter().map(|(key, _)| key).collect::<Vec<_>>(), [third, second]);
        assert_eq!(table.len(), 2);
    }
}
