//! Reads and writes of several blocks at once.

use super::*;

/// Two registrations of the peer, a piece of each in turns, and gaps between their places here.
fn pieces(link: &Linked, second: RemoteId, lens: &[usize]) -> Vec<Piece> {
    let mut at = 0;
    let piece = |(number, len): (usize, &usize)| {
        at += *len + 64;
        let remote = if number % 3 == 2 { second } else { link.remote };
        let local = link.near.range(link.local, at - len, *len);
        Piece { remote, offset: (at + 1000) as u64, local }
    };
    lens.iter().enumerate().map(piece).collect()
}

fn linked() -> Option<(Linked, LocalId, RemoteId, HostMemory)> {
    linked_for(Access::RemoteRead)
}

fn linked_for(access: Access) -> Option<(Linked, LocalId, RemoteId, HostMemory)> {
    let (near, far) = (End::open(false)?, End::open(false)?);
    let mut link = Linked::new(near, far, 1 << 20, access);
    let other = memory(1 << 20, 9);
    let (owned, key) = link.far.driver.register(&other.span(), access).unwrap();
    let second = link.near.driver.import(link.peer, &key).unwrap();
    Some((link, owned, second, other))
}

#[test]
fn each_piece_lands_in_its_place_whatever_it_travels_with() {
    let Some((mut link, _, second, other)) = linked() else { return };
    let most = link.near.driver.pieces_max().read;
    assert!(most >= 8, "or this tests nothing");
    let mixed = [
        &[4096, 65_536, 65_536, 100, 200_000, 65_536, 1, 30_000][..],
        &[65_536; 8],
        &[1; 8],
        &[131_071, 131_071, 131_071],
    ];
    for (op, lens) in (10..).zip(mixed) {
        link.here.write(0, &pattern(1 << 20, 1));
        let (before, there, other) = (bytes(&link.here), bytes(&link.there), bytes(&other));
        let pieces = pieces(&link, second, lens);
        link.near.driver.read_pieces(link.peer, &pieces, op).unwrap();
        assert_eq!(link.wait(op), Ok(lens.iter().sum()));
        let mut expected = before;
        for Piece { remote, offset, local } in pieces {
            let from = if remote == second { &other } else { &there };
            expected[local.offset..][..local.len].copy_from_slice(&from[offset as usize..][..local.len]);
        }
        assert!(bytes(&link.here) == expected, "{lens:?}");
    }
}

#[test]
fn a_piece_that_is_refused_fails_the_read_once_nothing_of_it_is_under_way() {
    let Some((mut link, owned, second, _other)) = linked() else { return };
    link.far.driver.deregister(owned);
    let pieces = pieces(&link, second, &[65_536, 200_000, 65_536, 4096, 4096, 300]);
    link.near.driver.read_pieces(link.peer, &pieces, 1).unwrap();
    let why = link.wait(1).unwrap_err();
    assert!(why.contains("refused"), "{why}");
    assert!(link.near.driver.core.slots.busy().is_empty(), "it was reported when all of it was over");
    link.read(0, 0, 65_536, 2).unwrap();
    assert_eq!(link.wait(2), Ok(65_536));
}

#[test]
fn pieces_that_do_not_belong_together_are_refused() {
    let Some((mut link, _, second, _other)) = linked() else { return };
    let good = pieces(&link, second, &[100; 8]);
    let mut post = |pieces: &[Piece]| link.near.driver.read_pieces(link.peer, pieces, 1);
    assert_eq!(post(&[]), Err(PostError::Range));
    assert_eq!(post(&[&good[..], &good[..1]].concat()), Err(PostError::Range));
    let mut outside = good.clone();
    outside[7].offset = 1 << 20;
    assert_eq!(post(&outside), Err(PostError::Range));
    let mut elsewhere = good.clone();
    elsewhere[3].local.id = LocalId(u32::MAX);
    assert_eq!(post(&elsewhere), Err(PostError::Range));
    post(&good).unwrap();
    assert_eq!(link.wait(1), Ok(800));
}

#[test]
fn each_piece_is_written_to_its_place_whatever_it_travels_with() {
    let Some((mut link, _, second, other)) = linked_for(Access::RemoteWrite) else { return };
    let most = link.near.driver.pieces_max();
    assert!(most.write >= 8, "or this tests nothing");
    for (op, lens) in
        (10..).zip([&[4096; 8][..], &[1; 8], &[100, 65_536, 1, 30_000, 65_536], &[most.write_bytes / 2; 2]])
    {
        link.there.write(0, &pattern(1 << 20, op as u8));
        let (from, mut there, mut elsewhere) = (bytes(&link.here), bytes(&link.there), bytes(&other));
        let pieces = pieces(&link, second, lens);
        link.near.driver.write_pieces(link.peer, &pieces, op).unwrap();
        assert_eq!(link.wait(op), Ok(lens.iter().sum()));
        for Piece { remote, offset, local } in pieces {
            let to = if remote == second { &mut elsewhere } else { &mut there };
            to[offset as usize..][..local.len].copy_from_slice(&from[local.offset..][..local.len]);
        }
        assert!(bytes(&link.there) == there && bytes(&other) == elsewhere, "{lens:?}");
    }
}

#[test]
fn of_a_write_with_a_piece_that_is_refused_nothing_is_stored() {
    let Some((mut link, owned, second, other)) = linked_for(Access::RemoteWrite) else { return };
    link.far.driver.deregister(owned);
    let (there, elsewhere) = (bytes(&link.there), bytes(&other));
    let pieces = pieces(&link, second, &[4096, 4096, 4096, 300]);
    link.near.driver.write_pieces(link.peer, &pieces, 1).unwrap();
    let why = link.wait(1).unwrap_err();
    assert!(why.contains("refused"), "{why}");
    assert!(link.near.driver.core.slots.busy().is_empty(), "it was reported when all of it was over");
    assert!(bytes(&link.there) == there && bytes(&other) == elsewhere);
    link.write(0, 0, 4096, 2).unwrap();
    assert_eq!(link.wait(2), Ok(4096));
}

#[test]
fn a_registration_to_be_read_is_not_written_by_several_pieces_either() {
    let Some((mut link, _, second, other)) = linked() else { return };
    let (there, elsewhere) = (bytes(&link.there), bytes(&other));
    let pieces = pieces(&link, second, &[4096; 8]);
    link.near.driver.write_pieces(link.peer, &pieces, 1).unwrap();
    let why = link.wait(1).unwrap_err();
    assert!(why.contains("refused"), "{why}");
    assert!(bytes(&link.there) == there && bytes(&other) == elsewhere);
}

#[test]
fn pieces_of_a_write_are_bounded() {
    let Some((mut link, _, second, _other)) = linked_for(Access::RemoteWrite) else { return };
    let most = link.near.driver.pieces_max().write_bytes;
    let too_much = pieces(&link, second, &[most / 2, most / 2 + 1]);
    assert_eq!(link.near.driver.write_pieces(link.peer, &too_much, 1), Err(PostError::Range));
    let too_many = pieces(&link, second, &[1; 9]);
    assert_eq!(link.near.driver.write_pieces(link.peer, &too_many, 1), Err(PostError::Range));
    assert!(link.near.driver.core.slots.busy().is_empty());
}
