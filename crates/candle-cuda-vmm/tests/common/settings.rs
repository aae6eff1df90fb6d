//! The tests' settings, from environment variables.

use super::GRANULE;
use candle_cuda_vmm::cuda_vmm::DriverKind;
use std::ffi::OsString;

/// `real` or `simulated`. Default: a GPU if the feature `cuda` is on and there is one, otherwise
/// the CPU.
pub const DRIVER: &str = "CUDA_VMM_TEST_DRIVER";
/// How many devices to open, 1 or 2. Default: 1. The last one is under test.
pub const DEVICES: &str = "CUDA_VMM_TEST_DEVICES";
/// The page of the pools in bytes. Default: the device's granularity.
pub const PAGE_BYTES: &str = "CUDA_VMM_TEST_PAGE_BYTES";
/// `default-stream` or `own-stream`: the stream of Candle's device on a GPU. Default:
/// `default-stream`.
pub const CANDLE_DEVICE: &str = "CUDA_VMM_TEST_CANDLE_DEVICE";

/// The stream of Candle's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CandleStream {
    /// `Device::new_cuda`.
    Default,
    /// `Device::new_cuda_with_stream`.
    Own,
}

/// The values of the variables; `None` if unset and the default depends on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub driver: Option<DriverKind>,
    pub devices: usize,
    pub page_bytes: Option<usize>,
    pub candle_stream: Option<CandleStream>,
}

impl Settings {
    /// Reads this process's variables. Panics if a value is not one of those above.
    pub fn of_process() -> Self {
        Self::read(|variable| std::env::var_os(variable))
            .unwrap_or_else(|message| panic!("{message}"))
    }

    /// Reads the variables by `value_of`. The error names variable and value.
    pub fn read(value_of: impl Fn(&str) -> Option<OsString>) -> Result<Self, String> {
        let read = |variable: &str| {
            value_of(variable)
                .map(|value| {
                    let unreadable = |value| format!("{variable} is {value:?}; it is not text");
                    value.into_string().map_err(unreadable)
                })
                .transpose()
        };
        let driver = match read(DRIVER)?.as_deref() {
            None => None,
            Some("real") => Some(DriverKind::Real),
            Some("simulated") => Some(DriverKind::Simulated),
            Some(other) => return Err(unknown(DRIVER, other, "\"real\" or \"simulated\"")),
        };
        let devices = match read(DEVICES)?.as_deref() {
            None | Some("1") => 1,
            Some("2") => 2,
            Some(other) => return Err(unknown(DEVICES, other, "1 or 2")),
        };
        let page_bytes = match read(PAGE_BYTES)? {
            None => None,
            Some(value) => match value.parse::<usize>() {
                Ok(bytes) if bytes.is_power_of_two() && bytes >= GRANULE => Some(bytes),
                _ => {
                    let allowed = format!("a power of two of at least {GRANULE}");
                    return Err(unknown(PAGE_BYTES, &value, &allowed));
                }
            },
        };
        let candle_stream = match read(CANDLE_DEVICE)?.as_deref() {
            None => None,
            Some("default-stream") => Some(CandleStream::Default),
            Some("own-stream") => Some(CandleStream::Own),
            Some(other) => {
                let allowed = "\"default-stream\" or \"own-stream\"";
                return Err(unknown(CANDLE_DEVICE, other, allowed));
            }
        };
        Ok(Self {
            driver,
            devices,
            page_bytes,
            candle_stream,
        })
    }

    /// Returns why this kind of driver, with this many devices, cannot provide these settings;
    /// `None` if it can.
    pub fn unsuited(&self, kind: DriverKind, device_count: usize) -> Option<String> {
        if let (DriverKind::Simulated, Some(stream)) = (kind, self.candle_stream) {
            return Some(format!(
                "{CANDLE_DEVICE} is set ({stream:?}), but the driver is simulated and Candle's device the CPU"
            ));
        }
        (self.devices > device_count).then(|| {
            format!(
                "{DEVICES} asks for {} devices, but the {kind} has {device_count} here",
                self.devices
            )
        })
    }
}

fn unknown(variable: &str, value: &str, allowed: &str) -> String {
    format!("{variable} is {value:?}; it may be {allowed}")
}
