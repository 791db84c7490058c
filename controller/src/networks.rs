//! What is asked of IPv4 networks in more than one place.

use ipnet::Ipv4Net;

/// Whether some address is in both: of two networks, that is so only where one is within the other.
pub fn overlap(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_overlap_where_one_is_within_the_other() {
        let overlap = |a: &str, b: &str| overlap(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(overlap("10.0.0.0/24", "10.0.0.0/24"));
        assert!(overlap("10.0.0.0/16", "10.0.7.0/24") && overlap("10.0.7.0/24", "10.0.0.0/16"));
        assert!(overlap("0.0.0.0/0", "10.0.0.0/8"));
        // As asked for, with host bits.
        assert!(overlap("10.0.7.9/16", "10.0.3.0/24"));
        assert!(!overlap("10.0.0.0/24", "10.0.1.0/24") && !overlap("10.0.1.0/24", "10.0.0.0/24"));
    }
}
