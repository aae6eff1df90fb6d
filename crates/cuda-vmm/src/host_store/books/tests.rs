//! The books beside a plain model, which has one flag for each unit of each piece.

use super::*;
use proptest::prelude::*;

const UNIT: usize = UNIT_BYTES;

#[derive(Debug, Clone)]
enum Step {
    /// Promises, and takes what is free.
    Reserve {
        units: usize,
    },
    /// Makes pieces for the oldest reservation that misses bytes, or fails to.
    Make {
        piece_units: usize,
        fails: bool,
    },
    GiveBack {
        which: usize,
    },
    TakeOut {
        down_to_units: usize,
    },
    /// The driver gave back a piece that was taken out, or refused to.
    Leave {
        is_gone: bool,
    },
    SetLimit {
        units: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..12usize).prop_map(|units| Step::Reserve { units }),
        4 => (1..5usize, prop::bool::weighted(0.2))
            .prop_map(|(piece_units, fails)| Step::Make { piece_units, fails }),
        4 => any::<usize>().prop_map(|which| Step::GiveBack { which }),
        1 => (0..20usize).prop_map(|down_to_units| Step::TakeOut { down_to_units }),
        2 => any::<bool>().prop_map(|is_gone| Step::Leave { is_gone }),
        1 => (0..30usize).prop_map(|units| Step::SetLimit { units }),
    ]
}

/// What the books should say.
#[derive(Debug, Default)]
struct Model {
    limit_units: usize,
    /// Whether each unit is taken.
    pieces: BTreeMap<PieceNumber, Vec<bool>>,
    leaving: BTreeMap<PieceNumber, usize>,
    promised_units: usize,
}

impl Model {
    /// The free runs in order: piece, first unit, length.
    fn free_runs(&self) -> Vec<(PieceNumber, usize, usize)> {
        let mut runs = Vec::new();
        for (number, units) in &self.pieces {
            let mut at = 0;
            for run in units.chunk_by(|one, other| one == other) {
                if !run[0] {
                    runs.push((*number, at, run.len()));
                }
                at += run.len();
            }
        }
        runs
    }

    fn taken_units(&self) -> usize {
        let units = self.pieces.values().flatten();
        units.filter(|is_taken| **is_taken).count()
    }

    fn registered_units(&self) -> usize {
        let pieces = self.pieces.values().map(Vec::len).sum::<usize>();
        pieces + self.leaving.values().sum::<usize>()
    }

    fn set(&mut self, extents: &[PieceExtent], is_taken: bool) {
        for extent in extents {
            let first = extent.offset / UNIT;
            let units = self.pieces.get_mut(&extent.piece).expect("a piece");
            for unit in &mut units[first..first + extent.bytes / UNIT] {
                assert_ne!(*unit, is_taken, "{extent:?}");
                *unit = is_taken;
            }
        }
    }

    fn check(&self, books: &Books) {
        let expected = HostStoreStats {
            limit_bytes: self.limit_units * UNIT,
            registered_bytes: self.registered_units() * UNIT,
            in_use_bytes: (self.taken_units() + self.promised_units) * UNIT,
            pieces: self.pieces.len() + self.leaving.len(),
        };
        assert_eq!(books.stats(), expected);
        let free = books.pieces.iter().flat_map(|(number, piece)| {
            let extents = piece.free.iter();
            extents.map(|(start, end)| (*number, start / UNIT, (end - start) / UNIT))
        });
        assert_eq!(free.collect::<Vec<_>>(), self.free_runs(), "not merged");
    }
}

/// A reservation, with the units that it misses.
struct Reservation {
    extents: Vec<PieceExtent>,
    missing_units: usize,
}

impl Reservation {
    fn take(&mut self, books: &mut Books, model: &mut Model) {
        let runs = model.free_runs();
        let fitting = runs.iter().find(|(.., units)| *units >= self.missing_units);
        let before = self.extents.len();
        let bytes = books.take(self.missing_units * UNIT, &mut self.extents);
        let new = &self.extents[before..];
        model.set(new, true);
        model.promised_units -= bytes / UNIT;
        let free: usize = runs.iter().map(|(.., units)| units).sum();
        assert_eq!(bytes / UNIT, free.min(self.missing_units));
        if let Some((piece, unit, _)) = fitting
            && self.missing_units > 0
        {
            let first = PieceExtent {
                piece: *piece,
                offset: unit * UNIT,
                bytes,
            };
            assert_eq!(new, [first], "the first that has room");
        }
        self.missing_units -= bytes / UNIT;
    }
}

fn run(steps: Vec<Step>) {
    let limit_units = 24;
    let (mut books, mut model) = (
        Books::new(limit_units * UNIT + 1),
        Model {
            limit_units,
            ..Model::default()
        },
    );
    let mut whole: Vec<Reservation> = Vec::new();
    let mut waiting: Vec<Reservation> = Vec::new();
    let mut was_lowered = false;
    for step in steps {
        match step {
            Step::Reserve { units } => {
                let in_use = model.taken_units() + model.promised_units;
                let promised = books.promise(units * UNIT);
                if in_use + units > model.limit_units {
                    let full = VmmError::HostStoreFull {
                        needed_bytes: units * UNIT,
                        in_use_bytes: in_use * UNIT,
                        limit_bytes: model.limit_units * UNIT,
                    };
                    assert_eq!(promised, Err(full));
                    continue;
                }
                assert_eq!(promised, Ok(()));
                model.promised_units += units;
                let mut reservation = Reservation {
                    extents: Vec::new(),
                    missing_units: units,
                };
                reservation.take(&mut books, &mut model);
                match reservation.missing_units {
                    0 => whole.push(reservation),
                    _ => waiting.push(reservation),
                }
            }
            // As one thread at a time does either.
            Step::Make { .. } if waiting.is_empty() || !model.leaving.is_empty() => {}
            Step::Make { piece_units, fails } => {
                let mut reservation = waiting.remove(0);
                reservation.take(&mut books, &mut model);
                let missing = reservation.missing_units;
                let sizes = books.sizes_to_make(missing * UNIT, piece_units * UNIT);
                let sizes: Vec<_> = sizes.collect();
                let made: usize = sizes.iter().map(|bytes| bytes / UNIT).sum();
                assert!(made >= missing && made < missing + piece_units);
                let full = |bytes: &usize| *bytes == piece_units * UNIT;
                let is_last_alone = sizes.iter().rev().skip(1).all(full);
                assert!(is_last_alone && !sizes.contains(&0), "{sizes:?}");
                if fails {
                    books.give_back(&reservation.extents);
                    books.cancel(missing * UNIT);
                    model.set(&reservation.extents, false);
                    model.promised_units -= missing;
                } else {
                    for bytes in sizes {
                        let number = books.add(bytes);
                        let before = model.pieces.insert(number, vec![false; bytes / UNIT]);
                        assert_eq!(before, None, "a number is used once");
                    }
                    assert!(was_lowered || model.registered_units() <= model.limit_units);
                    reservation.take(&mut books, &mut model);
                    assert_eq!(reservation.missing_units, 0, "enough was made");
                    whole.push(reservation);
                }
            }
            Step::GiveBack { .. } if whole.is_empty() => {}
            Step::GiveBack { which } => {
                let reservation = whole.swap_remove(which % whole.len());
                books.give_back(&reservation.extents);
                model.set(&reservation.extents, false);
            }
            Step::TakeOut { .. } if !model.leaving.is_empty() => {}
            Step::TakeOut { down_to_units } => {
                let out = books.take_out(down_to_units * UNIT);
                for number in out {
                    let stays: usize = model.pieces.values().map(Vec::len).sum();
                    assert!(stays > down_to_units, "no more than needed");
                    let units = model.pieces.remove(&number).expect("a piece");
                    assert!(!units.contains(&true), "in use");
                    model.leaving.insert(number, units.len());
                }
                let stays: usize = model.pieces.values().map(Vec::len).sum();
                let has_empty = model.pieces.values().any(|units| !units.contains(&true));
                assert!(stays <= down_to_units || !has_empty, "all that is needed");
            }
            Step::Leave { is_gone } => {
                let Some((number, units)) = model.leaving.pop_first() else {
                    continue;
                };
                if is_gone {
                    books.gone(number);
                } else {
                    books.put_back(number);
                    model.pieces.insert(number, vec![false; units]);
                }
            }
            Step::SetLimit { units } => {
                was_lowered |= units < model.limit_units;
                model.limit_units = units;
                books.set_limit(units * UNIT + UNIT - 1);
            }
        }
        model.check(&books);
        let is_above = model.registered_units() > model.limit_units;
        assert_eq!(books.is_above_limit(), is_above);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn the_books_are_those_of_a_plain_model(steps in prop::collection::vec(step(), 1..120)) {
        run(steps);
    }
}

#[test]
fn pieces_are_taken_out_from_the_last_and_no_more_than_needed() {
    let mut books = Books::new(8 * UNIT);
    let numbers = [2, 2, 2].map(|units| books.add(units * UNIT));
    books.promise(UNIT).expect("room");
    let mut taken = Vec::new();
    assert_eq!(books.take(UNIT, &mut taken), UNIT);
    assert_eq!(taken[0].piece, numbers[0]);
    assert_eq!(books.take_out(4 * UNIT), [numbers[2]]);
    // What leaves is counted until it has gone, and is not taken out for twice.
    assert_eq!(books.stats().registered_bytes, 6 * UNIT);
    assert_eq!(books.take_out(4 * UNIT), []);
    books.gone(numbers[2]);
    assert_eq!(books.stats().registered_bytes, 4 * UNIT);
    assert_eq!(books.take_out(0), [numbers[1]], "the first is in use");
    books.put_back(numbers[1]);
    books.give_back(&taken);
    assert_eq!(books.take_out(0), [numbers[1], numbers[0]]);
}
