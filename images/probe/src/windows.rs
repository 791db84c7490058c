//! Where the machine's virtio devices are, if the command line says so: the words that Linux takes too (kernel document
//! admin-guide/kernel-parameters, `virtio_mmio.device=`), with which other monitors than ours name each device. Without them the windows are at the places that
//! ours gives them.

/// A register window and the interrupt of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Guest-physical address.
    pub address: u64,
    /// Pin of the I/O APIC.
    pub gsi: u32,
}

/// Addresses that the probe's page tables reach (`boot::paging`).
const REACHED: core::ops::Range<u64> = 0xc000_0000..0xd020_0000;
/// Pins of the I/O APIC.
const PINS: u32 = 24;

/// The devices that the command line names, in its order. `refuse` is told each such word that is not understood, or names what cannot be reached.
pub fn named<'a>(command_line: &'a str, mut refuse: impl FnMut(&'a str)) -> impl Iterator<Item = Place> {
    command_line.split_ascii_whitespace().filter_map(move |word| {
        let place = place(word.strip_prefix("virtio_mmio.device=")?);
        if place.is_none() {
            refuse(word);
        }
        place
    })
}

/// `SIZE@ADDRESS:GSI`, perhaps with `:ID` behind.
fn place(text: &str) -> Option<Place> {
    let (_, rest) = text.split_once('@')?;
    let mut parts = rest.split(':');
    let address = number(parts.next()?)?;
    let gsi = number(parts.next()?).and_then(|gsi| u32::try_from(gsi).ok())?;
    let is_reached = REACHED.contains(&address) && address.is_multiple_of(4) && gsi < PINS;
    is_reached.then_some(Place { address, gsi })
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(line: &str) -> (Vec<Place>, Vec<&str>) {
        let mut refused = Vec::new();
        let places = named(line, |word| refused.push(word)).collect();
        (places, refused)
    }

    #[test]
    fn devices_are_taken_in_their_order_and_other_words_left_alone() {
        let line = "console=ttyS0 virtio_mmio.device=4K@0xc0001000:5 quiet virtio_mmio.device=512@3489660928:6:1";
        let expected = [Place { address: 0xc000_1000, gsi: 5 }, Place { address: 0xd000_0000, gsi: 6 }];
        assert_eq!(all(line), (expected.to_vec(), Vec::new()));
        assert_eq!(all("console=ttyS0").0, []);
    }

    #[test]
    fn what_is_not_understood_or_not_reached_is_told() {
        let line = "virtio_mmio.device= virtio_mmio.device=4K@0xfeb00000:5 virtio_mmio.device=4K@0xc0001000 \
                    virtio_mmio.device=4K@0xc0001001:5 virtio_mmio.device=4K@0xc0001000:24";
        assert_eq!(all(line), (Vec::new(), line.split_ascii_whitespace().collect()));
    }

    proptest! {
        #[test]
        fn no_line_panics_and_every_place_is_reached(line in "(virtio_mmio.device=[0-9a-fxK@: ]{0,24}){0,4}") {
            prop_assert!(all(&line).0.iter().all(|place| REACHED.contains(&place.address) && place.gsi < PINS));
        }
    }
}
