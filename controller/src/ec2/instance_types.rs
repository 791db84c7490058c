//! The instance types on offer, and `DescribeInstanceTypes`.
//!
//! Names and sizes are EC2's own where EC2 has one of that size, so that what was written for EC2 runs
//! unchanged; `mallee.tiny` and `mallee.micro` are smaller than anything EC2 sells, for classes of many
//! guests on one machine.

use super::filters::{self, Table, flag, one};
use super::model::{
    ArchitectureType, BootModeType, DescribeInstanceTypesRequest, DescribeInstanceTypesResult, InstanceTypeInfo,
    MemoryInfo, NetworkInfo, ProcessorInfo, RootDeviceType, UsageClassType, VCpuInfo, VirtualizationType,
};
use super::{Context, Refusal, pages};

/// What an instance is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstanceType {
    pub name: &'static str,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Private addresses that its interface may have, the primary one among them.
    pub addresses: usize,
}

const fn of(name: &'static str, vcpus: u32, memory_mib: u64, addresses: usize) -> InstanceType {
    InstanceType { name, vcpus, memory_mib, addresses }
}

/// Sizes of EC2's types and the addresses of their interfaces: EC2 Instance Types Guide, "General purpose", "Compute optimized".
const TYPES: &[InstanceType] = &[
    of("mallee.tiny", 1, 64, 2),
    of("mallee.micro", 1, 128, 2),
    of("t2.nano", 1, 512, 2),
    of("t2.micro", 1, 1024, 2),
    of("t2.small", 1, 2048, 4),
    of("t2.medium", 2, 4096, 6),
    of("t3.nano", 2, 512, 2),
    of("t3.micro", 2, 1024, 2),
    of("t3.small", 2, 2048, 4),
    of("t3.medium", 2, 4096, 6),
    of("t3.large", 2, 8192, 12),
    of("m5.large", 2, 8192, 10),
    of("m5.xlarge", 4, 16_384, 15),
    of("m5.2xlarge", 8, 32_768, 15),
    of("c5.large", 2, 4096, 10),
    of("c5.xlarge", 4, 8192, 15),
    of("c5.2xlarge", 8, 16_384, 15),
];

/// What `RunInstances` launches when no type is named: EC2's own default is a type of 2006 with 1 CPU
/// and 1.7 GiB; this is the nearest here.
pub const DEFAULT: &str = "t2.small";

/// The type of that name.
pub fn find(name: &str) -> Option<&'static InstanceType> {
    TYPES.iter().find(|kind| kind.name == name)
}

const FILTERS: Table<InstanceTypeInfo> = &[
    ("instance-type", |kind| one(&kind.instance_type)),
    ("current-generation", |kind| flag(kind.current_generation)),
    ("bare-metal", |kind| flag(kind.bare_metal)),
    ("burstable-performance-supported", |kind| flag(kind.burstable_performance_supported)),
    ("instance-storage-supported", |kind| flag(kind.instance_storage_supported)),
    ("vcpu-info.default-vcpus", |kind| {
        kind.v_cpu_info.iter().filter_map(|info| info.default_v_cpus).map(|n| n.to_string()).collect()
    }),
    ("memory-info.size-in-mib", |kind| {
        kind.memory_info.iter().filter_map(|info| info.size_in_mi_b).map(|n| n.to_string()).collect()
    }),
    ("processor-info.supported-architecture", |_| vec!["x86_64".to_owned()]),
];

/// `DescribeInstanceTypes`.
pub(crate) async fn describe_instance_types(
    _: &Context,
    request: DescribeInstanceTypesRequest,
) -> Result<DescribeInstanceTypesResult, Refusal> {
    if let Some(unknown) = request.instance_types.iter().find(|name| find(name).is_none()) {
        return Err(unknown_type(unknown));
    }
    let wanted = |kind: &&InstanceType| {
        request.instance_types.is_empty() || request.instance_types.iter().any(|name| name == kind.name)
    };
    let kinds = TYPES.iter().filter(wanted).map(answer).collect();
    let kinds = filters::select(kinds, &request.filters, FILTERS)?;
    let key = |kind: &InstanceTypeInfo| kind.instance_type.clone().unwrap_or_default();
    let (kinds, next_token) = pages::page(kinds, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeInstanceTypesResult { instance_types: Some(kinds), next_token })
}

/// A type that is not on offer. (`RunInstances` answers `InvalidParameterValue`, as EC2 does.)
fn unknown_type(name: &str) -> Refusal {
    let names: Vec<&str> = TYPES.iter().map(|kind| kind.name).collect();
    let names = names.join(", ");
    Refusal::client("InvalidInstanceType", format!("The instance type '{name}' does not exist; on offer are {names}"))
}

fn answer(kind: &InstanceType) -> InstanceTypeInfo {
    let vcpus = i32::try_from(kind.vcpus).unwrap_or(i32::MAX);
    InstanceTypeInfo {
        auto_recovery_supported: Some(false),
        bare_metal: Some(false),
        burstable_performance_supported: Some(kind.name.starts_with('t')),
        current_generation: Some(true),
        dedicated_hosts_supported: Some(false),
        free_tier_eligible: Some(true),
        hibernation_supported: Some(false),
        instance_storage_supported: Some(false),
        instance_type: Some(kind.name.to_owned()),
        memory_info: Some(MemoryInfo { size_in_mi_b: Some(kind.memory_mib.cast_signed()) }),
        network_info: Some(NetworkInfo {
            ipv4_addresses_per_interface: i32::try_from(kind.addresses).ok(),
            ipv6_supported: Some(false),
            maximum_network_cards: Some(1),
            maximum_network_interfaces: Some(1),
            ..NetworkInfo::default()
        }),
        processor_info: Some(ProcessorInfo {
            supported_architectures: Some(vec![ArchitectureType::X86_64]),
            ..ProcessorInfo::default()
        }),
        supported_boot_modes: Some(vec![BootModeType::LEGACY_BIOS]),
        supported_root_device_types: Some(vec![RootDeviceType::EBS]),
        supported_usage_classes: Some(vec![UsageClassType::ON_DEMAND]),
        supported_virtualization_types: Some(vec![VirtualizationType::HVM]),
        v_cpu_info: Some(VCpuInfo {
            default_cores: Some(vcpus),
            default_threads_per_core: Some(1),
            default_v_cpus: Some(vcpus),
            ..VCpuInfo::default()
        }),
        ..InstanceTypeInfo::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_default_is_one_of_them() {
        for (place, kind) in TYPES.iter().enumerate() {
            assert!(TYPES[place + 1..].iter().all(|other| other.name != kind.name), "{} twice", kind.name);
        }
        assert!(find(DEFAULT).is_some());
    }
}
