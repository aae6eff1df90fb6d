//! Depends on the core without the simulator: asks for the real driver.

fn main() {
    match cuda_vmm::Driver::cuda() {
        Ok(driver) => println!("driver: {} {}", driver.kind(), driver.version()),
        Err(error) => println!("driver: {error}"),
    }
}
