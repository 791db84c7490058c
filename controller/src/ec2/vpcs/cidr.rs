//! Which networks VPCs and subnets may have.
//!
//! A network is from /16 to /28 (Amazon VPC User Guide, "VPC CIDR blocks"); host bits are taken away, as EC2 does. Unlike EC2's, a VPC's network must be
//! private: a node lets no instance, of whatever VPC, send to the outside what is for an address that some VPC there has, so a VPC with
//! somebody else's public addresses would keep all others from them.

use std::ops::RangeInclusive;

use ipnet::Ipv4Net;

use crate::ec2::Refusal;
use crate::networks::overlap;

const PREFIX_LENGTHS: RangeInclusive<u8> = 16..=28;

/// RFC 1918, section 3, and RFC 6598 (shared address space).
const PRIVATE: [([u8; 4], u8); 4] =
    [([10, 0, 0, 0], 8), ([172, 16, 0, 0], 12), ([192, 168, 0, 0], 16), ([100, 64, 0, 0], 10)];

/// The network of a new VPC; `public` are those that the cloud itself has on its public side.
pub(super) fn of_vpc(text: &str, mut public: impl Iterator<Item = Ipv4Net>) -> Result<Ipv4Net, Refusal> {
    const RANGE: &str = "InvalidVpc.Range";
    let network = parse(text)?;
    if !PREFIX_LENGTHS.contains(&network.prefix_len()) {
        return Err(Refusal::client(RANGE, format!("The CIDR '{text}' is invalid: it must be from /16 to /28.")));
    }
    let private = |(address, length): ([u8; 4], u8)| {
        Ipv4Net::new(address.into(), length).is_ok_and(|private| private.contains(&network))
    };
    if !PRIVATE.into_iter().any(private) {
        let message = format!(
            "The CIDR '{text}' is invalid: here a VPC's network is within 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 or 100.64.0.0/10."
        );
        return Err(Refusal::client(RANGE, message));
    }
    if let Some(taken) = public.find(|public| overlap(public, &network)) {
        let message = format!("The CIDR '{text}' is invalid: it overlaps {}, this cloud's public side.", taken.trunc());
        return Err(Refusal::client(RANGE, message));
    }
    Ok(network)
}

/// The network of a new subnet of a VPC that has `others`.
pub(super) fn of_subnet(text: &str, vpc: Ipv4Net, others: &[Ipv4Net]) -> Result<Ipv4Net, Refusal> {
    const RANGE: &str = "InvalidSubnet.Range";
    let network = parse(text)?;
    if !PREFIX_LENGTHS.contains(&network.prefix_len()) {
        return Err(Refusal::client(RANGE, format!("The CIDR '{text}' is invalid: it must be from /16 to /28.")));
    }
    if !vpc.contains(&network) {
        return Err(Refusal::client(RANGE, format!("The CIDR '{text}' is invalid: it is not within the VPC's {vpc}.")));
    }
    if let Some(other) = others.iter().find(|other| overlap(other, &network)) {
        let message = format!("The CIDR '{text}' conflicts with another subnet ({other})");
        return Err(Refusal::client("InvalidSubnet.Conflict", message));
    }
    Ok(network)
}

fn parse(text: &str) -> Result<Ipv4Net, Refusal> {
    let malformed = |_| {
        Refusal::invalid_parameter(format!(
            "Value ({text}) for parameter cidrBlock is invalid. This is not a valid CIDR block."
        ))
    };
    text.parse().map(|network: Ipv4Net| network.trunc()).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn a_vpcs_network_is_private_and_of_ec2s_sizes() {
        let public = [net("198.51.100.128/25"), net("192.168.7.2/24")];
        let code = |text: &str| match of_vpc(text, public.into_iter()) {
            Ok(network) => network.to_string(),
            Err(refusal) => refusal.code.into_owned(),
        };
        for (asked, answer) in [
            ("10.0.0.0/16", "10.0.0.0/16"),
            ("10.0.7.9/16", "10.0.0.0/16"),
            ("100.64.0.18/18", "100.64.0.0/18"),
            ("192.168.8.0/28", "192.168.8.0/28"),
            ("10.0.0.0/15", "InvalidVpc.Range"),
            ("10.0.0.0/29", "InvalidVpc.Range"),
            ("8.8.8.0/24", "InvalidVpc.Range"),
            ("172.32.0.0/16", "InvalidVpc.Range"),
            ("192.168.0.0/16", "InvalidVpc.Range"),
            ("10.0.0.0", "InvalidParameterValue"),
            ("10.0.0.0/33", "InvalidParameterValue"),
            ("fd00::/8", "InvalidParameterValue"),
        ] {
            assert_eq!(code(asked), answer, "{asked}");
        }
    }

    #[test]
    fn a_subnet_is_within_its_vpc_and_beside_the_others() {
        let others = [net("10.0.0.0/24"), net("10.0.2.0/23")];
        let code = |text: &str| match of_subnet(text, net("10.0.0.0/16"), &others) {
            Ok(network) => network.to_string(),
            Err(refusal) => refusal.code.into_owned(),
        };
        for (asked, answer) in [
            ("10.0.1.0/24", "10.0.1.0/24"),
            ("10.0.4.1/28", "10.0.4.0/28"),
            ("10.0.0.0/16", "InvalidSubnet.Conflict"),
            ("10.0.3.0/24", "InvalidSubnet.Conflict"),
            ("10.1.0.0/24", "InvalidSubnet.Range"),
            ("10.0.1.0/29", "InvalidSubnet.Range"),
            ("10.0.0.0/8", "InvalidSubnet.Range"),
            ("x", "InvalidParameterValue"),
        ] {
            assert_eq!(code(asked), answer, "{asked}");
        }
    }

    proptest! {
        /// However they are asked for: no address is in two subnets, and none outside of the VPC.
        #[test]
        fn subnets_never_overlap(asked in proptest::collection::vec((0_u16.., 16_u8..=30), 1..40)) {
            let vpc = net("10.7.0.0/16");
            let mut there: Vec<Ipv4Net> = Vec::new();
            for (host, length) in asked {
                let text = format!("10.7.{}.{}/{length}", host >> 8, host & 255);
                if let Ok(network) = of_subnet(&text, vpc, &there) {
                    there.push(network);
                }
            }
            for (n, one) in there.iter().enumerate() {
                prop_assert!(vpc.contains(one) && PREFIX_LENGTHS.contains(&one.prefix_len()));
                prop_assert!(there[n + 1..].iter().all(|other| !overlap(one, other)));
            }
        }
    }
}
