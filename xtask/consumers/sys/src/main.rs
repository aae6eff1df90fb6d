//! Depends on the bindings alone, by bindgen or declared by hand: loads the driver, or says why not.

use std::ffi::c_int;

fn main() {
    match cuda_vmm_sys::load() {
        Ok(table) => {
            let mut version: c_int = 0;
            // SAFETY: the pointer is to a live integer, which is what the call writes.
            let code = unsafe { (table.cuDriverGetVersion)(&mut version) };
            println!("driver: version {version}, code {code}");
        }
        Err(error) => println!("driver: {error}"),
    }
}
