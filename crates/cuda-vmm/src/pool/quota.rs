//! What a model may hold.

use crate::engine::Quota;

/// What a model may hold beside the others; see [`SharedMemoryPool::set_quota`](super::SharedMemoryPool::set_quota).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ModelQuota {
    /// Memory in bytes that is always to be had for it, whatever other models do.
    pub guarantee_bytes: usize,
    /// The most memory in bytes that it may hold, if less than the pool's limit.
    pub ceiling_bytes: Option<usize>,
    /// Who is served first when several wait for memory, and asked last to give some back: the higher; any number.
    pub priority: i32,
}

impl ModelQuota {
    /// No guarantee, no ceiling, priority 0.
    pub const fn new() -> Self {
        Self {
            guarantee_bytes: 0,
            ceiling_bytes: None,
            priority: 0,
        }
    }

    /// With memory in bytes that is always to be had.
    pub const fn guarantee_bytes(mut self, bytes: usize) -> Self {
        self.guarantee_bytes = bytes;
        self
    }

    /// With this many bytes at most.
    pub const fn ceiling_bytes(mut self, bytes: usize) -> Self {
        self.ceiling_bytes = Some(bytes);
        self
    }

    /// With this priority.
    pub const fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }
}

impl From<ModelQuota> for Quota {
    fn from(quota: ModelQuota) -> Self {
        Self {
            guarantee_bytes: quota.guarantee_bytes,
            ceiling_bytes: quota.ceiling_bytes.unwrap_or(usize::MAX),
            priority: quota.priority,
        }
    }
}

impl From<Quota> for ModelQuota {
    fn from(quota: Quota) -> Self {
        let ceiling_bytes = quota.ceiling_bytes;
        Self {
            guarantee_bytes: quota.guarantee_bytes,
            ceiling_bytes: (ceiling_bytes != usize::MAX).then_some(ceiling_bytes),
            priority: quota.priority,
        }
    }
}
