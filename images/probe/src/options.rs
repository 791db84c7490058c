//! Options of the guest's command line: words that begin with `probe.`. All others are somebody else's.

use core::net::Ipv4Addr;

use crate::net::Address;

/// Where the metadata service is, unless told otherwise: EC2's address and port.
const METADATA: (Ipv4Addr, u16) = (Ipv4Addr::new(169, 254, 169, 254), 80);

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// `probe.ip=10.0.0.2/24`, with `probe.gw=10.0.0.1`: a fixed address in place of DHCP.
    pub address: Option<Address>,
    /// `probe.metadata=off` or `probe.metadata=10.0.0.1:8080`.
    pub metadata: Option<(Ipv4Addr, u16)>,
    /// `probe.poweroff=allow`: whoever reaches the stats port may turn the guest off.
    pub may_power_off: bool,
    /// `probe.trial=exercise` or `probe.trial=hostile:SEED`: the monitor is tried, and nothing else done.
    pub trial: Option<Trial>,
}

/// A trial of the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trial {
    /// Every virtio device is used by the rules.
    Exercise,
    /// Every virtio device is attacked, in an order that the seed gives.
    Hostile { seed: u64 },
}

impl Options {
    /// Reads the command line. `refuse` is told every `probe.` word that is not understood.
    pub fn parse<'a>(command_line: &'a str, mut refuse: impl FnMut(&'a str)) -> Options {
        let mut options = Options { address: None, metadata: Some(METADATA), may_power_off: false, trial: None };
        let mut gateway = None;
        for word in command_line.split_ascii_whitespace() {
            let Some(option) = word.strip_prefix("probe.") else { continue };
            if options.set(option, &mut gateway).is_none() {
                refuse(word);
            }
        }
        match (&mut options.address, gateway) {
            (Some(address), gateway) => address.gateway = gateway,
            (None, Some(_)) => refuse("probe.gw without probe.ip"),
            (None, None) => {}
        }
        options
    }

    fn set(&mut self, option: &str, gateway: &mut Option<Ipv4Addr>) -> Option<()> {
        match option.split_once('=')? {
            ("ip", value) => self.address = Some(network_address(value)?),
            ("gw", value) => *gateway = Some(value.parse().ok()?),
            ("metadata", "off") => self.metadata = None,
            ("metadata", value) => self.metadata = Some(socket_address(value)?),
            ("poweroff", "allow") => self.may_power_off = true,
            ("trial", "exercise") => self.trial = Some(Trial::Exercise),
            ("trial", value) => {
                let seed = value.strip_prefix("hostile:")?.parse().ok()?;
                self.trial = Some(Trial::Hostile { seed });
            }
            _ => return None,
        }
        Some(())
    }
}

fn network_address(text: &str) -> Option<Address> {
    let (ip, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    Some(Address { ip: ip.parse().ok()?, prefix, gateway: None })
}

fn socket_address(text: &str) -> Option<(Ipv4Addr, u16)> {
    match text.split_once(':') {
        Some((ip, port)) => Some((ip.parse().ok()?, port.parse().ok()?)),
        None => Some((text.parse().ok()?, METADATA.1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> (Options, Vec<&str>) {
        let mut refused = Vec::new();
        let options = Options::parse(line, |word| refused.push(word));
        (options, refused)
    }

    #[test]
    fn without_options_dhcp_and_metadata_are_used_and_nobody_turns_it_off() {
        let (options, refused) = parse("console=ttyS0 quiet");
        assert_eq!(options, Options { address: None, metadata: Some(METADATA), may_power_off: false, trial: None });
        assert!(refused.is_empty());
    }

    #[test]
    fn every_option_is_taken() {
        let (options, refused) =
            parse("probe.gw=10.0.0.1 probe.ip=10.0.0.2/24 probe.metadata=10.0.0.1:8080 probe.poweroff=allow");
        let gateway = Some(Ipv4Addr::new(10, 0, 0, 1));
        let address = Address { ip: Ipv4Addr::new(10, 0, 0, 2), prefix: 24, gateway };
        assert_eq!(options.address, Some(address));
        assert_eq!(options.metadata, Some((Ipv4Addr::new(10, 0, 0, 1), 8080)));
        assert!(options.may_power_off && refused.is_empty());
        assert_eq!(parse("probe.trial=exercise").0.trial, Some(Trial::Exercise));
        assert_eq!(parse("probe.trial=hostile:7").0.trial, Some(Trial::Hostile { seed: 7 }));
    }

    #[test]
    fn what_is_not_understood_is_told() {
        let line = "probe.ip=10.0.0.2 probe.ip=10.0.0.2/33 probe.metadata=here probe.poweroff=yes probe.x=1 probe.ip probe.trial=7";
        assert_eq!(parse(line).1, line.split(' ').collect::<Vec<_>>());
        assert_eq!(parse("probe.gw=10.0.0.1").1, ["probe.gw without probe.ip"]);
    }
}
