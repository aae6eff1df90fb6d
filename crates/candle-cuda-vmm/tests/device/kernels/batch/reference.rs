//! Attention in double precision: all scores, then a softmax, then sums.

use super::random::Random;

/// Returns the result of a sequence's query, `[query_heads, value_dim]`.
pub fn attend(random: &Random, sequence: usize) -> Vec<f64> {
    let case = &random.case;
    let options = case.options();
    let [k_scale, v_scale] = case.scales.map(f64::from);
    let group = case.query_heads / case.kv_heads;
    let queries = &random.q[sequence * case.query_heads * case.dim..];
    let mut results = Vec::new();
    for query_head in 0..case.query_heads {
        let query = &queries[query_head * case.dim..][..case.dim];
        let row = |rows: &[f32], token: usize, dim: usize| {
            let first = (token * case.kv_heads + query_head / group) * dim;
            let row = rows[first..first + dim].iter();
            row.map(|number| f64::from(*number)).collect::<Vec<_>>()
        };
        let score = |token| {
            let key = row(&random.k[sequence], token, case.dim);
            let products = query.iter().zip(key).map(|(q, k)| f64::from(*q) * k);
            let score = products.sum::<f64>() * f64::from(options.scale) * k_scale;
            match options.soft_cap.map(f64::from) {
                Some(cap) => cap * (score / cap).tanh(),
                None => score,
            }
        };
        let scores: Vec<f64> = case.seen(sequence).map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut result = vec![0.; case.value_dim];
        for (token, weight) in case.seen(sequence).zip(weights) {
            let value = row(&random.v[sequence], token, case.value_dim);
            for (result, value) in result.iter_mut().zip(value) {
                *result += weight / sum * value;
            }
        }
        results.extend(result.into_iter().map(|number| number * v_scale));
    }
    results
}
