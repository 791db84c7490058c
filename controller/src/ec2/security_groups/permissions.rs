//! Rules as EC2 writes them, and back.
//!
//! A request has `IpPermissions`, each a kind of traffic with lists of peers, or one kind of traffic and one peer as
//! parameters of its own. Either comes out as rules of one peer each, which is what has an id.

use ipnet::{Ipv4Net, Ipv6Net};

use super::{Row, by_id, by_name};
use crate::ec2::model::{IpPermission, IpRange, Ipv6Range, PrefixListId, UserIdGroupPair};
use crate::ec2::{Refusal, prefix_lists};
use crate::ids::{SecurityGroupId, SecurityGroupRuleId};
use crate::state::prefix_lists::PrefixList;
use crate::state::security_groups::{ALL_TRAFFIC, ANY, Rule};

const ICMP: i32 = 1;
const TCP: i32 = 6;
const UDP: i32 = 17;
const ICMPV6: i32 = 58;
/// EC2's words for protocols; others are numbers.
const PROTOCOLS: [(&str, i32); 4] = [("tcp", TCP), ("udp", UDP), ("icmp", ICMP), ("icmpv6", ICMPV6)];
/// Of a rule's description, in characters.
const DESCRIPTION_MOST: usize = 255;

/// What a request says of the rules that it is about.
#[derive(Debug, Default)]
pub struct Asked {
    pub permissions: Vec<IpPermission>,
    pub protocol: Option<String>,
    pub from_port: Option<i32>,
    pub to_port: Option<i32>,
    pub cidr: Option<String>,
    pub peer_name: Option<String>,
    pub peer_owner: Option<String>,
}

/// What of the account's own a rule may name.
#[derive(Clone, Copy)]
pub struct Own<'a> {
    pub groups: &'a [Row],
    pub prefix_lists: &'a [PrefixList],
}

/// A kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Traffic {
    protocol: i32,
    from_port: i32,
    to_port: i32,
}

impl Asked {
    /// The rules meant, of `group`.
    pub fn rules(self, own: Own, group: &Row, egress: bool) -> Result<Vec<Rule>, Refusal> {
        let mut permissions = self.permissions;
        let simple = [&self.protocol, &self.cidr, &self.peer_name].into_iter().any(Option::is_some);
        if simple && !permissions.is_empty() {
            return Err(Refusal::client(
                "InvalidParameterCombination",
                "The parameter IpPermissions may not be used together with IpProtocol, CidrIp or SourceSecurityGroupName",
            ));
        }
        if simple {
            let pair = self.peer_name.map(|group_name| UserIdGroupPair {
                group_name: Some(group_name),
                user_id: self.peer_owner,
                ..UserIdGroupPair::default()
            });
            let range = self.cidr.map(|cidr| IpRange { cidr_ip: Some(cidr), description: None });
            permissions.push(IpPermission {
                // EC2: a group alone stands for all of its traffic.
                ip_protocol: self.protocol.or_else(|| pair.as_ref().map(|_| ALL_TRAFFIC.to_string())),
                from_port: self.from_port,
                to_port: self.to_port,
                ip_ranges: Some(range.into_iter().collect()),
                user_id_group_pairs: Some(pair.into_iter().collect()),
                ..IpPermission::default()
            });
        }
        if permissions.is_empty() {
            return Err(Refusal::missing_parameter("IpPermissions"));
        }
        let mut rules: Vec<Rule> = Vec::new();
        for permission in permissions {
            for rule in rules_of(permission, own, group, egress)? {
                if rules.iter().any(|other| other.allows_same(&rule)) {
                    return Err(Refusal::invalid_parameter(format!(
                        "The same permission must not appear multiple times: {}",
                        in_words(&rule)
                    )));
                }
                rules.push(rule);
            }
        }
        Ok(rules)
    }
}

fn rules_of(permission: IpPermission, own: Own, group: &Row, egress: bool) -> Result<Vec<Rule>, Refusal> {
    let traffic = traffic(&permission)?;
    let start = |description: Option<String>| {
        check_description(description.as_deref())?;
        Ok::<_, Refusal>(Rule {
            id: SecurityGroupRuleId::random(),
            group_id: group.id.clone(),
            egress,
            protocol: traffic.protocol,
            from_port: traffic.from_port,
            to_port: traffic.to_port,
            cidr_ipv4: None,
            cidr_ipv6: None,
            peer_group: None,
            prefix_list: None,
            description,
        })
    };
    let mut rules = Vec::new();
    for range in permission.ip_ranges.into_iter().flatten() {
        let cidr =
            range.cidr_ip.as_deref().ok_or_else(|| Refusal::missing_parameter("IpPermissions.IpRanges.CidrIp"))?;
        // EC2 takes host bits away.
        let network: Ipv4Net = cidr.parse().map_err(|_| malformed_cidr(cidr))?;
        rules.push(Rule { cidr_ipv4: Some(network.trunc().to_string()), ..start(range.description)? });
    }
    for range in permission.ipv6_ranges.into_iter().flatten() {
        let cidr = range
            .cidr_ipv6
            .as_deref()
            .ok_or_else(|| Refusal::missing_parameter("IpPermissions.Ipv6Ranges.CidrIpv6"))?;
        let network: Ipv6Net = cidr.parse().map_err(|_| malformed_cidr(cidr))?;
        rules.push(Rule { cidr_ipv6: Some(network.trunc().to_string()), ..start(range.description)? });
    }
    for pair in permission.user_id_group_pairs.into_iter().flatten() {
        let peer = peer(&pair, own.groups, group)?;
        rules.push(Rule { peer_group: Some(peer), ..start(pair.description)? });
    }
    for list in permission.prefix_list_ids.into_iter().flatten() {
        let id = list
            .prefix_list_id
            .as_deref()
            .ok_or_else(|| Refusal::missing_parameter("IpPermissions.PrefixListIds.PrefixListId"))?;
        let found = prefix_lists::by_id(own.prefix_lists, id)?;
        rules.push(Rule { prefix_list: Some(found.id.clone()), ..start(list.description)? });
    }
    if rules.is_empty() {
        return Err(Refusal::invalid_parameter(
            "A permission names nobody: give it IpRanges, Ipv6Ranges, UserIdGroupPairs or PrefixListIds",
        ));
    }
    Ok(rules)
}

/// A group of the account's own in the VPC of `group`; another account's is not found.
fn peer(pair: &UserIdGroupPair, own: &[Row], group: &Row) -> Result<SecurityGroupId, Refusal> {
    let named = pair.group_id.as_deref().or(pair.group_name.as_deref()).unwrap_or_default();
    if pair.user_id.as_ref().is_some_and(|user| *user != group.account_id) {
        return Err(super::not_found(named, ""));
    }
    let peer = match (&pair.group_id, &pair.group_name) {
        (Some(id), _) => by_id(own, id)?,
        (None, Some(name)) => by_name(own, &group.vpc_id, name)?,
        (None, None) => return Err(Refusal::missing_parameter("IpPermissions.UserIdGroupPairs.GroupId")),
    };
    if peer.vpc_id != group.vpc_id {
        let message = "You have specified two resources that belong to different networks.";
        return Err(Refusal::client("InvalidGroup.NotFound", message));
    }
    Ok(peer.id.clone())
}

fn traffic(permission: &IpPermission) -> Result<Traffic, Refusal> {
    let name = permission.ip_protocol.as_deref().ok_or_else(|| Refusal::missing_parameter("IpProtocol"))?;
    let protocol = protocol(name)?;
    let any = Traffic { protocol, from_port: ANY, to_port: ANY };
    match protocol {
        TCP | UDP => {
            let given = |port: Option<i32>, what: &str| port.ok_or_else(|| Refusal::missing_parameter(what));
            let (from, to) = (given(permission.from_port, "FromPort")?, given(permission.to_port, "ToPort")?);
            // EC2's own shorthand for all ports.
            let (from, to) = if (from, to) == (ANY, ANY) { (0, i32::from(u16::MAX)) } else { (from, to) };
            let is_port = |port: i32| u16::try_from(port).is_ok();
            if !is_port(from) || !is_port(to) || from > to {
                let name = name.to_ascii_uppercase();
                return Err(Refusal::invalid_parameter(format!("Invalid {name} port range ({from}:{to})")));
            }
            Ok(Traffic { protocol, from_port: from, to_port: to })
        }
        ICMP | ICMPV6 => {
            let (kind, code) = (permission.from_port.unwrap_or(ANY), permission.to_port.unwrap_or(ANY));
            if !(ANY..=255).contains(&kind) || !(ANY..=255).contains(&code) || (kind == ANY && code != ANY) {
                return Err(Refusal::invalid_parameter(format!("ICMP code ({code}) or type ({kind}) is invalid")));
            }
            Ok(Traffic { protocol, from_port: kind, to_port: code })
        }
        _ => Ok(any),
    }
}

fn protocol(name: &str) -> Result<i32, Refusal> {
    let word = PROTOCOLS.iter().find(|(word, _)| word.eq_ignore_ascii_case(name)).map(|(_, number)| *number);
    let number = word.or_else(|| name.parse().ok()).filter(|number| (ALL_TRAFFIC..=255).contains(number));
    number.ok_or_else(|| {
        Refusal::invalid_parameter(format!(
            "Invalid value '{name}' for IP protocol. Unknown protocol: use tcp, udp, icmp, icmpv6, -1 or a number up to 255"
        ))
    })
}

/// EC2's word for a protocol.
pub fn protocol_name(number: i32) -> String {
    let word = PROTOCOLS.iter().find(|(_, known)| *known == number);
    word.map_or_else(|| number.to_string(), |(word, _)| (*word).to_owned())
}

fn malformed_cidr(cidr: &str) -> Refusal {
    Refusal::invalid_parameter(format!("CIDR block {cidr} is malformed"))
}

fn check_description(text: Option<&str>) -> Result<(), Refusal> {
    match text {
        Some(text) if text.chars().count() > DESCRIPTION_MOST => {
            Err(Refusal::invalid_parameter(format!("Invalid rule description: at most {DESCRIPTION_MOST} characters")))
        }
        Some(text) => super::check_text("Description", text),
        None => Ok(()),
    }
}

/// A rule as EC2's messages write one.
pub fn in_words(rule: &Rule) -> String {
    let group = rule.peer_group.as_ref().map(|id| id.as_str());
    let list = rule.prefix_list.as_ref().map(|id| id.as_str());
    let peer = [rule.cidr_ipv4.as_deref(), rule.cidr_ipv6.as_deref(), group, list];
    let peer = peer.into_iter().flatten().next().unwrap_or_default();
    let protocol = match rule.protocol {
        ALL_TRAFFIC => "ALL".to_owned(),
        number => protocol_name(number).to_ascii_uppercase(),
    };
    let ports = match rule.protocol {
        TCP | UDP => format!(", from port: {}, to port: {}", rule.from_port, rule.to_port),
        ICMP | ICMPV6 => format!(", type: {}, code: {}", rule.from_port, rule.to_port),
        _ => String::new(),
    };
    format!("peer: {peer}, {protocol}{ports}, ALLOW")
}

/// A group's rules of one direction, those of one kind of traffic together, as `DescribeSecurityGroups` shows them.
pub fn shown(rules: &[&Rule], egress: bool, group: &Row) -> Vec<IpPermission> {
    let mut out: Vec<(Traffic, IpPermission)> = Vec::new();
    for rule in rules.iter().filter(|rule| rule.egress == egress) {
        let traffic = Traffic { protocol: rule.protocol, from_port: rule.from_port, to_port: rule.to_port };
        let place = out.iter().position(|(known, _)| *known == traffic).unwrap_or_else(|| {
            out.push((traffic, of_nobody(traffic)));
            out.len() - 1
        });
        add_peer(&mut out[place].1, rule, group);
    }
    out.into_iter().map(|(_, permission)| permission).collect()
}

fn of_nobody(traffic: Traffic) -> IpPermission {
    let has_numbers = matches!(traffic.protocol, TCP | UDP | ICMP | ICMPV6);
    IpPermission {
        ip_protocol: Some(protocol_name(traffic.protocol)),
        from_port: has_numbers.then_some(traffic.from_port),
        to_port: has_numbers.then_some(traffic.to_port),
        ip_ranges: Some(Vec::new()),
        ipv6_ranges: Some(Vec::new()),
        prefix_list_ids: Some(Vec::new()),
        user_id_group_pairs: Some(Vec::new()),
    }
}

fn add_peer(permission: &mut IpPermission, rule: &Rule, group: &Row) {
    let description = rule.description.clone();
    if let Some(cidr) = &rule.cidr_ipv4 {
        let range = IpRange { cidr_ip: Some(cidr.clone()), description };
        permission.ip_ranges.get_or_insert_default().push(range);
    } else if let Some(cidr) = &rule.cidr_ipv6 {
        let range = Ipv6Range { cidr_ipv6: Some(cidr.clone()), description };
        permission.ipv6_ranges.get_or_insert_default().push(range);
    } else if let Some(peer) = &rule.peer_group {
        permission.user_id_group_pairs.get_or_insert_default().push(UserIdGroupPair {
            description,
            group_id: Some(peer.to_string()),
            user_id: Some(group.account_id.clone()),
            ..UserIdGroupPair::default()
        });
    } else if let Some(list) = &rule.prefix_list {
        let list = PrefixListId { description, prefix_list_id: Some(list.to_string()) };
        permission.prefix_list_ids.get_or_insert_default().push(list);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::VpcId;
    use proptest::prelude::*;

    fn group(name: &str) -> Row {
        Row {
            id: SecurityGroupId::random(),
            account_id: "111122223333".into(),
            vpc_id: VpcId::random(),
            name: name.into(),
            description: String::new(),
        }
    }

    fn of(groups: &[Row]) -> Own<'_> {
        Own { groups, prefix_lists: &[] }
    }

    fn simple(protocol: &str, from_port: Option<i32>, to_port: Option<i32>, cidr: &str) -> Result<Vec<Rule>, Refusal> {
        let asked =
            Asked { protocol: Some(protocol.into()), from_port, to_port, cidr: Some(cidr.into()), ..Asked::default() };
        let own = [group("web")];
        asked.rules(of(&own), &own[0], false)
    }

    #[test]
    fn the_simple_form_is_one_rule() {
        let rules = simple("tcp", Some(22), Some(23), "10.1.2.3/8").unwrap();
        assert_eq!((rules.len(), rules[0].protocol, rules[0].from_port, rules[0].to_port), (1, 6, 22, 23));
        assert_eq!(rules[0].cidr_ipv4.as_deref(), Some("10.0.0.0/8"), "host bits are taken away");
        let all = simple("-1", None, None, "0.0.0.0/0").unwrap();
        assert_eq!((all[0].protocol, all[0].from_port), (-1, -1));
        let ports = simple("udp", Some(-1), Some(-1), "0.0.0.0/0").unwrap();
        assert_eq!((ports[0].from_port, ports[0].to_port), (0, 65_535));
    }

    #[test]
    fn what_is_no_rule_is_refused_with_ec2s_codes() {
        let code = |outcome: Result<Vec<Rule>, Refusal>| outcome.unwrap_err().code.to_string();
        assert_eq!(code(simple("tcp", None, Some(1), "0.0.0.0/0")), "MissingParameter");
        assert_eq!(code(simple("tcp", Some(80), Some(22), "0.0.0.0/0")), "InvalidParameterValue");
        assert_eq!(code(simple("tcp", Some(0), Some(65_536), "0.0.0.0/0")), "InvalidParameterValue");
        assert_eq!(code(simple("icmp", Some(-1), Some(3), "0.0.0.0/0")), "InvalidParameterValue");
        assert_eq!(code(simple("carrier-pigeon", None, None, "0.0.0.0/0")), "InvalidParameterValue");
        assert_eq!(code(simple("tcp", Some(1), Some(1), "0.0.0.0/33")), "InvalidParameterValue");
        let own = [group("web")];
        assert_eq!(code(Asked::default().rules(of(&own), &own[0], false)), "MissingParameter");
        let nobody = IpPermission { ip_protocol: Some("-1".into()), ..IpPermission::default() };
        let asked = Asked { permissions: vec![nobody], ..Asked::default() };
        assert_eq!(code(asked.rules(of(&own), &own[0], false)), "InvalidParameterValue");
        let stranger = Asked { peer_name: Some("nobody".into()), ..Asked::default() };
        assert_eq!(code(stranger.rules(of(&own), &own[0], false)), "InvalidGroup.NotFound");
    }

    #[test]
    fn rules_are_shown_by_kind_of_traffic() {
        let own = [group("web")];
        let range = |cidr: &str| IpRange { cidr_ip: Some(cidr.into()), description: Some("lab".into()) };
        let permission = IpPermission {
            ip_protocol: Some("tcp".into()),
            from_port: Some(80),
            to_port: Some(80),
            ip_ranges: Some(vec![range("10.0.0.0/8"), range("192.0.2.0/24")]),
            user_id_group_pairs: Some(vec![UserIdGroupPair {
                group_name: Some("web".into()),
                ..UserIdGroupPair::default()
            }]),
            ..IpPermission::default()
        };
        let asked = Asked { permissions: vec![permission], ..Asked::default() };
        let rules = asked.rules(of(&own), &own[0], false).unwrap();
        assert_eq!(rules.len(), 3);
        let shown = shown(&rules.iter().collect::<Vec<_>>(), false, &own[0]);
        assert_eq!(shown.len(), 1);
        assert_eq!(shown[0].ip_ranges.as_ref().map(Vec::len), Some(2));
        assert_eq!(shown[0].user_id_group_pairs.as_ref().unwrap()[0].group_id, Some(own[0].id.to_string()));
    }

    proptest! {
        #[test]
        fn what_is_taken_is_in_range(protocol in "(-?[0-9]{1,4}|tcp|udp|icmp)", from: Option<i32>, to in -2..70_000_i32) {
            if let Ok(rules) = simple(&protocol, from, Some(to), "0.0.0.0/0") {
                let rule = &rules[0];
                prop_assert!((-1..=255).contains(&rule.protocol));
                prop_assert!((-1..=65_535).contains(&rule.from_port) && (-1..=65_535).contains(&rule.to_port));
                prop_assert!(!matches!(rule.protocol, TCP | UDP) || rule.from_port <= rule.to_port && rule.from_port >= 0);
            }
        }
    }
}
