//! A model that sleeps: its weights, keys and values give up their memory, and have it again at the
//! same addresses.
//!
//! # Safety
//! A captured step reads weights, keys and values, inputs, and the decoder's tables. The first are in
//! ranges that keep their addresses; the rest stays where it is while the model sleeps.
#![allow(unsafe_code)]

use super::runner::Runner;
use super::sleeper::{Kept, Sleeper};
use candle_cuda_vmm::{Result, VmmError};
use std::rc::Rc;

impl Runner {
    /// Lets the model sleep with these weights, of which its decoder was made.
    pub fn sleeping(mut self, sleeper: Sleeper) -> Self {
        self.sleeper = Some(sleeper);
        self
    }

    /// Whether the model sleeps: it computes nothing until it [wakes](Self::wake).
    pub fn is_asleep(&self) -> bool {
        !self.decoder.has_model()
    }

    /// Gives up all memory of the model. The host keeps its weights and prefixes, as far as the
    /// store has room: without room for the prefixes they are forgotten, and weights are read or
    /// made again.
    ///
    /// # Errors
    ///
    /// What keeps the memory. Then the model is awake; only if its memory has gone to others
    /// meanwhile, it sleeps, and can be woken.
    ///
    /// # Panics
    ///
    /// If the model has sequences.
    pub fn sleep(&mut self) -> Result<Option<Kept>> {
        assert!(self.is_idle(), "a model with sequences cannot sleep");
        if self.sleeper.is_none() || self.is_asleep() {
            return Ok(None);
        }
        self.device.synchronize()?;
        self.graph.pause();
        // The paused graph has dropped its clone.
        if let Some(decoder) = Rc::get_mut(&mut self.decoder) {
            decoder.drop_model();
        }
        let slept = self.sleep_memory();
        if slept.is_err() {
            // What cannot be woken now is woken later.
            _ = self.wake();
        }
        slept.map(Some)
    }

    fn sleep_memory(&mut self) -> Result<Kept> {
        let Some(sleeper) = &mut self.sleeper else {
            return Err(no_weights());
        };
        let prefixes = self.kv.sleep(&sleeper.store)?;
        let weights = sleeper.sleep()?;
        Ok(Kept { weights, prefixes })
    }

    /// Has the memory of the model again, all of it or none, and what was in it. Waits for nobody.
    ///
    /// # Errors
    ///
    /// For want of memory, or what a wake of weights returns. Then the model sleeps, and can be woken
    /// later.
    pub fn wake(&mut self) -> Result<()> {
        if !self.is_asleep() {
            return Ok(());
        }
        let woken = self.wake_memory();
        if woken.is_err()
            && let Some(sleeper) = &mut self.sleeper
        {
            if let Some(decoder) = Rc::get_mut(&mut self.decoder) {
                decoder.drop_model();
            }
            // What stays awake is what the next wake finds.
            _ = sleeper.sleep();
            if !self.kv.blocks().is_asleep() {
                _ = self.kv.sleep(&sleeper.store);
            }
        }
        woken
    }

    fn wake_memory(&mut self) -> Result<()> {
        let sleeper = self.sleeper.as_mut().ok_or_else(no_weights)?;
        sleeper.wake()?;
        self.kv.wake()?;
        let weights = sleeper.weights()?;
        if let Some(decoder) = Rc::get_mut(&mut self.decoder) {
            decoder.make_model(&sleeper.config, weights)?;
        }
        let step = Self::decode_step(&self.decoder, self.rows.inputs());
        // SAFETY: it is the step that was paused. Its weights are tensors of the same names in the
        // same range, so they have the same shapes, types and addresses. Keys and values are in
        // reserved tensors, and inputs, rotary table and plan were never dropped.
        unsafe { self.graph.resume(step) };
        Ok(())
    }

    /// Whether the host has room for all that the model holds, so that nothing of it is read, made or
    /// computed again after a sleep. What the host has already counts.
    pub fn fits_host(&self) -> bool {
        let account = self.kv.blocks().account().stats();
        self.sleeper.as_ref().is_some_and(|sleeper| {
            let free_bytes = sleeper.store.stats().available_bytes();
            free_bytes + account.host_bytes >= account.committed_bytes
        })
    }

    /// The bytes that a wake takes.
    pub fn asleep_bytes(&self) -> usize {
        match self.is_asleep() {
            true => self.kv.blocks().account().stats().asleep_bytes,
            false => 0,
        }
    }
}

fn no_weights() -> VmmError {
    candle_core::Error::msg("the model's weights are not in memory of a pool").into()
}
