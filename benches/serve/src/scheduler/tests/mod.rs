mod memory;
mod random;
mod world;

use super::*;
use memory::Memory;

const LIMITS: Limits = Limits {
    sequences_max: 4,
    step_tokens_max: 8,
    context_max: 40,
    waiting_max: 5,
};

fn ask(id: u64, prompt_tokens: usize, generated_max: usize) -> Ask {
    Ask {
        id: Id(id),
        prompt_tokens,
        generated_max,
    }
}

fn chunk(id: u64, first: usize, count: usize, is_last: bool) -> Chunk {
    Chunk {
        id: Id(id),
        first,
        count,
        is_last,
    }
}

fn ids(ids: &[u64]) -> Vec<Id> {
    ids.iter().copied().map(Id).collect()
}

/// A scheduler, and memory in blocks of one token.
struct Server {
    scheduler: Scheduler,
    memory: Memory,
}

impl Server {
    fn new(limits: Limits, memory_tokens: usize, asks: &[Ask]) -> Self {
        let mut server = Self {
            scheduler: Scheduler::new(limits),
            memory: Memory::new(1, memory_tokens),
        };
        for ask in asks {
            assert_eq!(server.submit(*ask), Ok(()));
        }
        server
    }

    fn submit(&mut self, ask: Ask) -> Result<(), Refusal> {
        self.scheduler.submit(ask, &self.memory)
    }

    fn plan(&mut self) -> Step {
        self.scheduler.plan(&mut self.memory)
    }

    fn finish(&mut self, step: &Step) -> Vec<Id> {
        self.scheduler.finish(step, |_| false, &mut self.memory)
    }

    /// Plans a step and finishes it.
    fn step(&mut self) -> Step {
        let step = self.plan();
        self.finish(&step);
        step
    }

    #[track_caller]
    fn expect_step(&mut self, decodes: &[u64], chunks: &[Chunk], preempted: &[u64]) {
        let step = self.step();
        assert_eq!(step.decodes, ids(decodes), "{step:?}");
        assert_eq!(step.chunks, chunks, "{step:?}");
        assert_eq!(step.preempted, ids(preempted), "{step:?}");
    }
}

#[test]
fn what_is_empty_is_refused() {
    let mut server = Server::new(LIMITS, 100, &[]);
    assert_eq!(server.submit(ask(1, 0, 5)), Err(Refusal::Empty));
    assert_eq!(server.submit(ask(1, 5, 0)), Err(Refusal::Empty));
    assert!(server.scheduler.is_idle());
}

#[test]
fn what_exceeds_the_context_is_refused() {
    let mut server = Server::new(LIMITS, 100, &[ask(1, 39, 1), ask(2, 1, 39)]);
    let (tokens, tokens_max) = (41, 40);
    let refusal = Err(Refusal::TooLong { tokens, tokens_max });
    assert_eq!(server.submit(ask(3, 40, 1)), refusal);
    let tokens = usize::MAX;
    let refusal = Err(Refusal::TooLong { tokens, tokens_max });
    assert_eq!(server.submit(ask(3, usize::MAX, usize::MAX)), refusal);
}

#[test]
fn what_could_never_have_its_memory_is_refused() {
    // The token that is generated last needs none.
    let mut server = Server::new(LIMITS, 9, &[ask(1, 8, 2)]);
    let (tokens, tokens_max) = (11, 10);
    let refusal = Err(Refusal::TooLong { tokens, tokens_max });
    assert_eq!(server.submit(ask(2, 8, 3)), refusal);
    server.expect_step(&[], &[chunk(1, 0, 8, true)], &[]);
    server.expect_step(&[1], &[], &[]);
    assert!(server.scheduler.is_idle(), "it had all");
}

#[test]
fn a_name_is_not_given_twice() {
    let mut server = Server::new(LIMITS, 100, &[ask(1, 4, 2)]);
    assert_eq!(server.submit(ask(1, 5, 5)), Err(Refusal::Duplicate));
    server.step();
    assert_eq!(server.submit(ask(1, 5, 5)), Err(Refusal::Duplicate));
    server.step();
    assert_eq!(server.submit(ask(1, 5, 5)), Ok(()), "the first has ended");
}

#[test]
fn no_more_wait_than_may() {
    let asks: Vec<_> = (0..5).map(|id| ask(id, 4, 3)).collect();
    let mut server = Server::new(LIMITS, 100, &asks);
    let refusal = Err(Refusal::Full { waiting: 5 });
    assert_eq!(server.submit(ask(5, 4, 3)), refusal);
    server.step();
    assert_eq!(server.submit(ask(5, 4, 3)), Ok(()), "two were admitted");
}

#[test]
fn a_step_has_all_decodes_and_chunks_up_to_its_budget() {
    let mut server = Server::new(LIMITS, 100, &[ask(1, 3, 9), ask(2, 11, 9), ask(3, 7, 9)]);
    server.expect_step(&[], &[chunk(1, 0, 3, true), chunk(2, 0, 5, false)], &[]);
    server.expect_step(&[1], &[chunk(2, 5, 6, true), chunk(3, 0, 2, false)], &[]);
    server.expect_step(&[1, 2], &[chunk(3, 2, 5, true)], &[]);
    let step = server.step();
    assert_eq!((step.decodes, step.chunks), (ids(&[1, 2, 3]), vec![]));
}

#[test]
fn no_more_run_than_may() {
    let asks: Vec<_> = (0..5).map(|id| ask(id, 1, 2)).collect();
    let mut server = Server::new(LIMITS, 100, &asks);
    assert_eq!(server.step().chunks.len(), 4);
    assert_eq!(server.scheduler.counts().waiting, 1);
    let step = server.step();
    assert_eq!((step.decodes.len(), step.chunks.len()), (4, 0));
    server.expect_step(&[], &[chunk(4, 0, 1, true)], &[]);
}

#[test]
fn a_sequence_ends_when_it_has_all_or_when_the_caller_says() {
    let mut server = Server::new(LIMITS, 100, &[ask(1, 2, 1), ask(2, 2, 9), ask(3, 9, 9)]);
    let mut asked = Vec::new();
    let step = server.plan();
    let ended = |id| {
        asked.push(id);
        id == Id(2)
    };
    let gone = server.scheduler.finish(&step, ended, &mut server.memory);
    assert_eq!(gone, ids(&[1, 2]));
    assert_eq!(asked, ids(&[1, 2]), "the third has no new token yet");
    assert_eq!(server.memory.holders(), ids(&[3]));
    let counts = server.scheduler.counts();
    assert_eq!((counts.generated_tokens, counts.computed_tokens), (2, 8));
}

#[test]
fn a_decode_without_memory_preempts_the_youngest() {
    let asks = [ask(1, 4, 9), ask(2, 3, 9), ask(3, 2, 9)];
    let mut server = Server::new(LIMITS, 12, &asks);
    let first = [
        chunk(1, 0, 4, true),
        chunk(2, 0, 3, true),
        chunk(3, 0, 1, false),
    ];
    server.expect_step(&[], &first, &[]);
    server.expect_step(&[1, 2], &[chunk(3, 1, 1, true)], &[]);
    // They have 5, 4 and 2 of 12. The first gets the last one, and the second none.
    server.expect_step(&[1, 2], &[], &[3]);
    server.expect_step(&[1], &[], &[2]);
}

#[test]
fn a_decode_whose_memory_is_coming_sits_out_with_what_it_has() {
    let asks = [ask(1, 4, 4), ask(2, 3, 4), ask(3, 1, 4)];
    let mut server = Server::new(LIMITS, 8, &asks);
    server.memory.set_now(7);
    let first = [chunk(1, 0, 4, true), chunk(2, 0, 3, true)];
    server.expect_step(&[], &first, &[]);
    server.memory.comes = 3;
    // They have all of 7. Nobody is preempted, and nobody is admitted.
    server.expect_step(&[], &[], &[]);
    assert_eq!(server.memory.holders(), ids(&[1, 2]));
    server.memory.set_now(8);
    server.expect_step(&[1], &[], &[]);
    // None came.
    server.expect_step(&[1], &[], &[2]);
    assert_eq!(server.scheduler.counts().preemptions, 1);
}

#[test]
fn the_preempted_are_the_first_to_be_admitted_later_and_have_all_computed_again() {
    let asks = [ask(1, 3, 4), ask(2, 3, 9), ask(3, 2, 9), ask(4, 1, 1)];
    let mut server = Server::new(
        Limits {
            sequences_max: 3,
            ..LIMITS
        },
        13,
        &asks,
    );
    let all = [
        chunk(1, 0, 3, true),
        chunk(2, 0, 3, true),
        chunk(3, 0, 2, true),
    ];
    server.expect_step(&[], &all, &[]);
    server.expect_step(&[1, 2, 3], &[], &[]);
    // They have 4, 4 and 3 of 13: one more each is too much.
    server.expect_step(&[1, 2], &[], &[3]);
    // There is memory for the fourth, but it does not overtake; the third has 2 + 2 tokens.
    server.expect_step(&[1, 2], &[], &[]);
    assert_eq!(server.memory.holders(), ids(&[2]), "the first has all");
    server.expect_step(&[2], &[chunk(3, 0, 4, true), chunk(4, 0, 1, true)], &[]);
    assert_eq!(server.scheduler.counts().preemptions, 1);
}

#[test]
fn a_decode_may_have_to_preempt_itself() {
    let mut server = Server::new(LIMITS, 6, &[ask(1, 3, 4), ask(2, 2, 4)]);
    server.expect_step(&[], &[chunk(1, 0, 3, true), chunk(2, 0, 2, true)], &[]);
    server.expect_step(&[1], &[], &[2]);
    let mut server = Server::new(LIMITS, 6, &[ask(1, 3, 4)]);
    server.step();
    // Another model has taken memory.
    server.memory.set_now(3);
    let step = server.step();
    assert!(step.is_empty());
    assert_eq!(step.preempted, ids(&[1]));
    assert_eq!(server.memory.holders(), []);
    assert!(server.step().is_empty(), "no memory for its four tokens");
    server.memory.set_now(6);
    server.expect_step(&[], &[chunk(1, 0, 4, true)], &[]);
}

#[test]
fn a_decode_preempts_as_many_as_it_must() {
    let mut server = Server::new(LIMITS, 9, &[ask(1, 6, 4), ask(2, 1, 4), ask(3, 1, 4)]);
    server.step();
    assert_eq!(server.memory.holders(), ids(&[1, 2, 3]));
    server.memory.set_now(7);
    server.expect_step(&[1], &[], &[3, 2]);
    let waiting = server.scheduler.waiting.iter().map(Sequence::id);
    assert_eq!(waiting.collect::<Vec<_>>(), ids(&[2, 3]));
}

#[test]
fn nobody_is_admitted_in_a_plan_that_preempts() {
    let mut server = Server::new(LIMITS, 11, &[ask(1, 3, 9), ask(2, 5, 4)]);
    server.step();
    server.memory.set_now(8);
    // What the second gives back would do for the third.
    assert_eq!(server.submit(ask(3, 1, 1)), Ok(()));
    server.expect_step(&[1], &[], &[2]);
    assert_eq!(server.scheduler.counts().running, 1);
}

#[test]
fn a_prompt_in_its_midst_keeps_its_place_and_can_be_preempted() {
    let mut server = Server::new(LIMITS, 16, &[ask(1, 3, 9), ask(2, 12, 4), ask(3, 1, 1)]);
    server.expect_step(&[], &[chunk(1, 0, 3, true), chunk(2, 0, 5, false)], &[]);
    // No memory for the other seven tokens: the third, with one, does not overtake.
    server.memory.set_now(10);
    server.expect_step(&[1], &[], &[]);
    server.expect_step(&[1], &[], &[]);
    assert_eq!(server.memory.holders(), ids(&[1, 2]));
    server.expect_step(&[1], &[], &[2]);
    server.memory.set_now(16);
    server.expect_step(&[1], &[chunk(2, 0, 8, false)], &[]);
}

#[test]
fn a_first_chunk_without_memory_holds_up_the_line_and_leaves_nothing_behind() {
    let mut server = Server::new(LIMITS, 9, &[ask(1, 3, 2), ask(2, 7, 1), ask(3, 1, 1)]);
    server.memory.set_cached(Id(2), 4);
    server.memory.set_now(7);
    // Four tokens are in the cache and one is for the chunk; a budget of five remains.
    server.expect_step(&[], &[chunk(1, 0, 3, true)], &[]);
    assert_eq!(server.memory.holders(), ids(&[1]));
    assert_eq!(server.scheduler.counts().cached_tokens, 0);
    server.memory.set_now(9);
    server.expect_step(&[1], &[], &[]);
    server.expect_step(&[], &[chunk(2, 4, 3, true), chunk(3, 0, 1, true)], &[]);
    assert_eq!(server.scheduler.counts().cached_tokens, 4);
}

#[test]
fn a_cached_prefix_is_not_computed() {
    let mut server = Server::new(LIMITS, 100, &[ask(1, 30, 1), ask(2, 4, 2)]);
    server.memory.set_cached(Id(1), 25);
    server.memory.set_cached(Id(2), 4);
    // If the cache claims all, the last token is computed even so.
    server.expect_step(&[], &[chunk(1, 25, 5, true), chunk(2, 3, 1, true)], &[]);
    let counts = server.scheduler.counts();
    assert_eq!((counts.cached_tokens, counts.computed_tokens), (28, 6));
    server.expect_step(&[2], &[], &[]);
    assert!(server.scheduler.is_idle());
}

#[test]
fn what_is_cancelled_gives_its_memory_back_at_once() {
    let asks = [ask(1, 2, 9), ask(2, 2, 9), ask(3, 9, 9), ask(4, 2, 9)];
    let mut server = Server::new(LIMITS, 100, &asks);
    let step = server.plan();
    let cancel = |server: &mut Server, id| server.scheduler.cancel(Id(id), &mut server.memory);
    assert!(cancel(&mut server, 2), "it is in the step");
    assert!(cancel(&mut server, 4), "it waits");
    assert!(!cancel(&mut server, 4));
    assert!(!cancel(&mut server, 5), "there is no such");
    assert_eq!(server.memory.holders(), ids(&[1, 3]));
    // The name is free again, and a step that had the other counts nothing for it.
    assert_eq!(server.submit(ask(2, 3, 9)), Ok(()));
    assert_eq!(server.finish(&step), []);
    assert_eq!(server.scheduler.counts().generated_tokens, 1);
    server.expect_step(&[1], &[chunk(3, 4, 5, true), chunk(2, 0, 3, true)], &[]);
}

#[test]
fn the_youngest_give_their_memory_to_other_models() {
    let mut server = Server::new(LIMITS, 100, &[ask(1, 3, 9), ask(2, 2, 9), ask(3, 3, 9)]);
    server.step();
    let step = server.plan();
    let give = |server: &mut Server, tokens| {
        let Server { scheduler, memory } = server;
        scheduler.give_back(tokens, memory)
    };
    assert_eq!(give(&mut server, 0), []);
    // The third has memory for four, the second for three.
    assert_eq!(give(&mut server, 4), ids(&[3]));
    assert_eq!(give(&mut server, 1), ids(&[2]));
    assert_eq!(server.finish(&step), []);
    assert_eq!(
        server.scheduler.counts().generated_tokens,
        4,
        "of the step only the first's"
    );
    assert_eq!(give(&mut server, 99), ids(&[1]));
    assert_eq!(give(&mut server, 99), []);
    assert_eq!(server.memory.holders(), []);
    server.expect_step(&[], &[chunk(1, 0, 5, true), chunk(2, 0, 3, true)], &[]);
    assert_eq!(server.scheduler.counts().preemptions, 3);
}

#[test]
fn a_step_that_was_not_finished_is_planned_again() {
    let mut server = Server::new(LIMITS, 100, &[ask(1, 3, 9), ask(2, 9, 9)]);
    let lost = server.plan();
    let step = server.plan();
    assert_eq!(step.chunks, [chunk(1, 0, 3, true), chunk(2, 0, 5, false)]);
    assert_eq!(lost.chunks, step.chunks);
    server.finish(&lost);
    assert_eq!(server.scheduler.counts().computed_tokens, 0);
    server.finish(&step);
    server.finish(&step);
    let counts = server.scheduler.counts();
    assert_eq!((counts.computed_tokens, counts.generated_tokens), (8, 1));
    let step = server.step();
    assert_eq!((step.tokens(), step.decodes), (5, ids(&[1])));
}

#[test]
fn what_was_planned_and_not_finished_does_not_count_later() {
    let mut server = Server::new(LIMITS, 12, &[ask(1, 3, 9), ask(2, 12, 1)]);
    assert_eq!(server.plan().tokens(), 8);
    assert!(server.scheduler.cancel(Id(1), &mut server.memory));
    // Five tokens of the second were planned. Now it could have eight, and there is no memory.
    server.memory.set_now(7);
    assert!(server.step().is_empty());
    assert_eq!(server.scheduler.counts().computed_tokens, 0);
    server.memory.set_now(12);
    server.expect_step(&[], &[chunk(2, 0, 8, false)], &[]);
}

#[test]
#[should_panic(expected = "no prompt could be computed")]
fn a_step_without_room_for_prompts_is_no_limit() {
    Scheduler::new(Limits {
        step_tokens_max: 0,
        ..LIMITS
    });
}
