//! Random arrivals, cancels and memory, against a plain model.

use super::memory::Memory;
use super::world::World;
use crate::scheduler::Limits;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Event {
    Submit {
        prompt_tokens: usize,
        generated_max: usize,
        ends_after: usize,
        /// Which prefix it begins with, and how much of it is cached afterwards.
        prefix: (usize, usize),
    },
    Cancel(usize),
    /// One more may be planned before the last is finished: it then counts for nothing.
    Plan,
    Finish,
    /// Other models leave so many blocks.
    Leave(usize),
    /// So often more is said to be about to come.
    Come(usize),
    /// What there is too much of after that is given back.
    GiveExcess,
    GiveBack(usize),
    Step,
}

fn events() -> impl Strategy<Value = Event> {
    let submit = (1..30usize, 1..20usize, 1..25usize, (0..3usize, 0..20usize));
    let submit =
        submit.prop_map(
            |(prompt_tokens, generated_max, ends_after, prefix)| Event::Submit {
                prompt_tokens,
                generated_max,
                ends_after,
                prefix,
            },
        );
    prop_oneof![
        8 => submit,
        2 => (0..20usize).prop_map(Event::Cancel),
        3 => Just(Event::Plan),
        3 => Just(Event::Finish),
        2 => (0..40usize).prop_map(Event::Leave),
        2 => Just(Event::Leave(usize::MAX)),
        2 => (0..6usize).prop_map(Event::Come),
        1 => Just(Event::GiveExcess),
        1 => (0..40usize).prop_map(Event::GiveBack),
        16 => Just(Event::Step),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    let limits = (1..7usize, 1..40usize, 20..50usize, 1..9usize);
    limits.prop_map(
        |(sequences_max, step_tokens_max, context_max, waiting_max)| Limits {
            sequences_max,
            step_tokens_max,
            context_max,
            waiting_max,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_sequence_ends_with_its_tokens(
        limits in limits(),
        block_tokens in 1..7usize,
        blocks in 4..40usize,
        events in prop::collection::vec(events(), 1..120),
    ) {
        let mut world = World::new(limits, Memory::new(block_tokens, blocks));
        let mut accepted = 0;
        for event in events {
            match event {
                Event::Submit { prompt_tokens, generated_max, ends_after, prefix } => {
                    let is_in = world.submit(prompt_tokens, generated_max, ends_after, prefix);
                    accepted += usize::from(is_in);
                }
                Event::Cancel(which) => world.cancel(which),
                Event::Plan => world.plan(),
                Event::Finish => world.finish(),
                Event::Leave(blocks) => world.memory.set_now(blocks),
                Event::Come(times) => world.memory.comes = times,
                Event::GiveExcess => world.give_back(world.memory.excess_tokens()),
                Event::GiveBack(tokens) => world.give_back(tokens),
                Event::Step => {
                    world.plan();
                    world.finish();
                }
            }
        }
        world.drain();
        prop_assert_eq!(world.ended + world.cancelled, accepted);
    }
}
