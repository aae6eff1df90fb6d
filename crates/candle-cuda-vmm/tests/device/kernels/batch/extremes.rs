//! NaN and infinities, as a softmax in double precision has them.

use super::layouts::Layout;
use super::random::{Case, Random};
use crate::common::open;
use candle_core::{DType, Device};

/// A place in K or V: sequence, token, head, element.
type Place = (usize, usize, usize, usize);

fn element(random: &mut Random, is_key: bool, (sequence, token, head, at): Place) -> &mut f32 {
    let case = &random.case;
    let (dim, rows) = match is_key {
        true => (case.dim, &mut random.k),
        false => (case.value_dim, &mut random.v),
    };
    &mut rows[sequence][(token * case.kv_heads + head) * dim + at]
}

fn check(change: impl Fn(&mut Random), device: &Device) {
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for (turn, layout) in Layout::ALL.into_iter().enumerate() {
        let dtype = dtypes[turn % 3];
        let case = Case {
            dtype,
            stored: dtype,
            dim: 16,
            value_dim: 16,
            ..Case::new(layout, &[70, 40])
        };
        let mut random = case.random(turn as u64);
        // All products with a key's first element have its sign.
        let queries = random.q.chunks_exact_mut(case.dim);
        queries.for_each(|query| query[0] = 1.);
        change(&mut random);
        random.check(turn as u64, device);
    }
}

#[test]
fn a_nan_that_a_query_sees_is_in_its_result() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for token in [0, 31, 32, 39] {
        for is_key in [true, false] {
            let change = |random: &mut Random| {
                *element(random, is_key, (1, token, 1, 3)) = f32::NAN;
                let is_nan = |number: &&f64| number.is_nan();
                let count = random.expected().iter().filter(is_nan).count();
                // Two of the four query heads share the head, and a key is in all their elements.
                assert_eq!(count, if is_key { 2 * 16 } else { 2 });
            };
            check(change, &test.device);
        }
    }
}

#[test]
fn an_infinite_score_is_nan_and_a_negative_one_has_no_weight() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for token in [0, 33, 69] {
        let plus = |random: &mut Random| {
            *element(random, true, (0, token, 0, 0)) = f32::INFINITY;
        };
        check(plus, &test.device);
        let minus = |random: &mut Random| {
            *element(random, true, (0, token, 0, 0)) = f32::NEG_INFINITY;
        };
        check(minus, &test.device);
    }
    // The first tiles have no finite score, then all have none.
    for end in [64, 70] {
        let all = |random: &mut Random| {
            for token in 0..end {
                *element(random, true, (0, token, 0, 0)) = f32::NEG_INFINITY;
            }
            let has_nan = random.expected().iter().any(|number| number.is_nan());
            assert_eq!(has_nan, end == 70);
        };
        check(all, &test.device);
    }
}

#[test]
fn an_infinite_value_is_in_its_element_alone() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for value in [f32::INFINITY, f32::NEG_INFINITY] {
        let change = |random: &mut Random| {
            *element(random, false, (0, 10, 1, 5)) = value;
        };
        check(change, &test.device);
    }
    let both = |random: &mut Random| {
        *element(random, false, (0, 10, 1, 5)) = f32::INFINITY;
        *element(random, false, (0, 50, 1, 5)) = f32::NEG_INFINITY;
    };
    check(both, &test.device);
}

#[test]
fn a_nan_query_spoils_its_own_head_alone() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let change = |random: &mut Random| {
        let dim = random.case.dim;
        random.q[2 * dim + 1] = f32::NAN;
    };
    check(change, &test.device);
}

#[test]
fn a_soft_cap_bounds_infinite_scores() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let change = |random: &mut Random| {
        random.case.soft_cap = Some(5.);
        *element(random, true, (0, 10, 0, 0)) = f32::INFINITY;
        *element(random, true, (0, 11, 0, 0)) = f32::NEG_INFINITY;
        assert!(random.expected().iter().all(|number| number.is_finite()));
    };
    check(change, &test.device);
}
