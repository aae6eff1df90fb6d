//! The environment variables: their valid values, and that others are refused.

use crate::common::GRANULE;
use crate::common::settings::{CANDLE_DEVICE, CandleStream, DEVICES, DRIVER, PAGE_BYTES, Settings};
use candle_cuda_vmm::cuda_vmm::DriverKind;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

const UNSET: Settings = Settings {
    driver: None,
    devices: 1,
    page_bytes: None,
    candle_stream: None,
};

/// Returns the settings if only these variables are set.
fn read(set: &[(&str, &str)]) -> Result<Settings, String> {
    Settings::read(|variable| {
        let (_, value) = set.iter().find(|(name, _)| *name == variable)?;
        Some(OsString::from(value))
    })
}

#[test]
fn every_value_that_there_is_can_be_read() {
    assert_eq!(read(&[]), Ok(UNSET));
    for (value, kind) in [
        ("real", DriverKind::Real),
        ("simulated", DriverKind::Simulated),
    ] {
        assert_eq!(read(&[(DRIVER, value)]).unwrap().driver, Some(kind));
    }
    for (value, devices) in [("1", 1), ("2", 2)] {
        assert_eq!(read(&[(DEVICES, value)]).unwrap().devices, devices);
    }
    for granules in [1, 8, 16] {
        let bytes = granules * GRANULE;
        let settings = read(&[(PAGE_BYTES, &bytes.to_string())]).unwrap();
        assert_eq!(settings.page_bytes, Some(bytes));
    }
    for (value, stream) in [
        ("default-stream", CandleStream::Default),
        ("own-stream", CandleStream::Own),
    ] {
        let settings = read(&[(CANDLE_DEVICE, value)]).unwrap();
        assert_eq!(settings.candle_stream, Some(stream));
    }
}

#[test]
fn any_other_value_is_refused_by_name() {
    for (variable, values) in [
        (DRIVER, ["", "Real", "cuda", "none"]),
        (DEVICES, ["", "0", "3", "two"]),
        (PAGE_BYTES, ["", "2 MiB", "1048576", "3145728"]),
        (CANDLE_DEVICE, ["", "default", "own", "cpu"]),
    ] {
        for value in values {
            let message = read(&[(variable, value)]).unwrap_err();
            let named = format!("{variable} is {value:?}; ");
            assert!(message.starts_with(&named), "{message}");
        }
        let message =
            Settings::read(|name| (name == variable).then(|| OsString::from_vec(vec![0xff])))
                .unwrap_err();
        assert!(message.starts_with(variable), "{message}");
    }
}

#[test]
fn more_devices_than_there_are_do_not_suit() {
    let two = Settings {
        devices: 2,
        ..UNSET
    };
    for kind in [DriverKind::Real, DriverKind::Simulated] {
        assert_eq!(UNSET.unsuited(kind, 1), None);
        let reason = two.unsuited(kind, 1).unwrap();
        assert!(reason.contains(DEVICES), "{reason}");
    }
    assert_eq!(two.unsuited(DriverKind::Real, 2), None);
    assert!(UNSET.unsuited(DriverKind::Real, 0).is_some());
}

#[test]
fn a_stream_for_candle_does_not_suit_the_cpu() {
    for stream in [CandleStream::Default, CandleStream::Own] {
        let settings = Settings {
            candle_stream: Some(stream),
            ..UNSET
        };
        assert_eq!(settings.unsuited(DriverKind::Real, 1), None);
        let reason = settings.unsuited(DriverKind::Simulated, 1).unwrap();
        assert!(reason.contains(CANDLE_DEVICE), "{reason}");
    }
}
