//! A list's entries: as a request gives them, and as a version's are described.

use ipnet::{Ipv4Net, Ipv6Net};

use super::{TEXT_MOST, named};
use crate::ec2::model::{
    AddPrefixListEntry, GetManagedPrefixListEntriesRequest, GetManagedPrefixListEntriesResult, PrefixListEntry,
};
use crate::ec2::{Context, Refusal, pages};
use crate::state::prefix_lists::{self, Entry, Family};

/// Versions of a list that are kept: EC2's quota. When it is reached, the oldest one goes.
pub(super) const VERSIONS_KEPT: i64 = 1000;

/// The entries that a request adds to a list of that family.
pub(super) fn added(entries: Vec<AddPrefixListEntry>, family: Family) -> Result<Vec<Entry>, Refusal> {
    let mut out: Vec<Entry> = Vec::with_capacity(entries.len());
    for entry in entries {
        let cidr = network(&entry.cidr, family)?;
        if out.iter().any(|other| other.cidr == cidr) {
            return Err(Refusal::invalid_parameter(format!("The request contains the CIDR {cidr} more than once")));
        }
        if entry.description.as_ref().is_some_and(|text| text.chars().count() > TEXT_MOST) {
            return Err(Refusal::invalid_parameter(format!(
                "The description of {cidr} is too long: at most {TEXT_MOST} characters"
            )));
        }
        out.push(Entry { cidr, description: entry.description });
    }
    Ok(out)
}

/// A network of that family as it is kept. EC2 refuses one with host bits.
pub(super) fn network(cidr: &str, family: Family) -> Result<String, Refusal> {
    let (network, example) = match family {
        Family::Ipv4 => {
            let network = cidr.parse().ok().filter(|net: &Ipv4Net| net.trunc() == *net);
            (network.map(|net| net.to_string()), "10.0.0.0/16")
        }
        Family::Ipv6 => {
            let network = cidr.parse().ok().filter(|net: &Ipv6Net| net.trunc() == *net);
            (network.map(|net| net.to_string()), "2001:db8::/32")
        }
    };
    network.ok_or_else(|| {
        Refusal::invalid_parameter(format!(
            "The specified CIDR ({cidr}) is not valid. For example, specify a CIDR in the following form: {example}."
        ))
    })
}

pub(super) fn check_count(count: usize, max_entries: i32) -> Result<(), Refusal> {
    match i32::try_from(count) {
        Ok(count) if count <= max_entries => Ok(()),
        _ => Err(Refusal::client(
            "PrefixListMaxEntriesExceeded",
            format!("The prefix list would have {count} entries; its maximum is {max_entries}: raise MaxEntries first"),
        )),
    }
}

/// `GetManagedPrefixListEntries`.
pub(crate) async fn get_managed_prefix_list_entries(
    context: &Context,
    request: GetManagedPrefixListEntriesRequest,
) -> Result<GetManagedPrefixListEntriesResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let list = named(&mut tx, context, &request.prefix_list_id).await?;
    let version = request.target_version.unwrap_or(list.version);
    let oldest = (list.version - VERSIONS_KEPT + 1).max(1);
    if !(oldest..=list.version).contains(&version) {
        return Err(Refusal::invalid_parameter(format!(
            "The version {version} of the prefix list {} does not exist: there are {oldest} to {}",
            list.id, list.version
        )));
    }
    let entries = prefix_lists::entries(&mut tx, &list.id, version).await?;
    drop(tx);
    let shown = |entry: Entry| PrefixListEntry { cidr: Some(entry.cidr), description: entry.description };
    let key = |entry: &PrefixListEntry| entry.cidr.clone().unwrap_or_default();
    let entries = entries.into_iter().map(shown).collect();
    let (entries, next_token) = pages::page_of(entries, key, request.max_results, request.next_token.as_deref())?;
    Ok(GetManagedPrefixListEntriesResult { entries: Some(entries), next_token })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(cidr: &str) -> AddPrefixListEntry {
        AddPrefixListEntry { cidr: cidr.into(), ..AddPrefixListEntry::default() }
    }

    #[test]
    fn an_entry_is_a_network_of_the_lists_family_without_host_bits() {
        let taken = added(vec![entry("10.0.0.0/8"), entry("192.0.2.7/32")], Family::Ipv4).unwrap();
        assert_eq!(taken.iter().map(|entry| entry.cidr.as_str()).collect::<Vec<_>>(), ["10.0.0.0/8", "192.0.2.7/32"]);
        assert_eq!(
            added(vec![entry("2001:DB8:0::/32")], Family::Ipv6).unwrap()[0].cidr,
            "2001:db8::/32",
            "one way to write it"
        );
        for (bad, family) in [
            ("10.1.2.3/8", Family::Ipv4),
            ("10.0.0.1", Family::Ipv4),
            ("2001:db8::/32", Family::Ipv4),
            ("10.0.0.0/8", Family::Ipv6),
        ] {
            assert_eq!(added(vec![entry(bad)], family).unwrap_err().code, "InvalidParameterValue", "{bad}");
        }
        let twice = vec![entry("10.0.0.0/8"), entry("10.0.0.0/8")];
        assert_eq!(added(twice, Family::Ipv4).unwrap_err().code, "InvalidParameterValue");
        assert!(check_count(2, 2).is_ok());
        assert_eq!(check_count(3, 2).unwrap_err().code, "PrefixListMaxEntriesExceeded");
    }
}
