//! Operations on buckets.

use s3s::dto::*;
use s3s::{S3Request, S3Response, s3_error};

use super::{Reply, Service, account, expect_owner, owner, refuse, refuse_acl, timestamp};

impl Service {
    pub(super) async fn create_bucket_(&self, request: S3Request<CreateBucketInput>) -> Reply<CreateBucketOutput> {
        let account = account(&request)?;
        let input = &request.input;
        refuse_acl(input.acl.as_ref().map(BucketCannedACL::as_str))?;
        let granted = [&input.grant_full_control, &input.grant_read, &input.grant_read_acp];
        let granted = granted.into_iter().chain([&input.grant_write, &input.grant_write_acp]).any(Option::is_some);
        refuse("A grant", granted)?;
        refuse("Object lock", input.object_lock_enabled_for_bucket == Some(true))?;
        let place = input.create_bucket_configuration.as_ref().and_then(|c| c.location_constraint.as_ref());
        if let Some(place) = place
            && place.as_str() != self.region
        {
            return Err(s3_error!(
                IllegalLocationConstraintException,
                "The location constraint {:?} is not this cloud's region, {:?}.",
                place.as_str(),
                self.region
            ));
        }
        self.store.create_bucket(account, &input.bucket).await?;
        Ok(S3Response::new(CreateBucketOutput { location: Some(format!("/{}", input.bucket)) }))
    }

    pub(super) async fn delete_bucket_(&self, request: S3Request<DeleteBucketInput>) -> Reply<DeleteBucketOutput> {
        let account = account(&request)?;
        expect_owner(account, request.input.expected_bucket_owner.as_ref())?;
        self.store.delete_bucket(account, &request.input.bucket).await?;
        Ok(S3Response::with_status(DeleteBucketOutput::default(), http::StatusCode::NO_CONTENT))
    }

    pub(super) async fn head_bucket_(&self, request: S3Request<HeadBucketInput>) -> Reply<HeadBucketOutput> {
        let account = account(&request)?;
        expect_owner(account, request.input.expected_bucket_owner.as_ref())?;
        self.store.bucket(account, &request.input.bucket).await?;
        Ok(S3Response::new(HeadBucketOutput { bucket_region: Some(self.region.clone()), ..Default::default() }))
    }

    pub(super) async fn list_buckets_(&self, request: S3Request<ListBucketsInput>) -> Reply<ListBucketsOutput> {
        let account = account(&request)?;
        let input = &request.input;
        let limit = match input.max_buckets {
            None => usize::MAX,
            Some(limit) if (1..=10_000).contains(&limit) => limit as usize,
            Some(_) => return Err(s3_error!(InvalidArgument, "max-buckets must be 1 to 10000.")),
        };
        let prefix = input.prefix.as_deref().unwrap_or("");
        let after = input.continuation_token.as_deref().unwrap_or("");
        let all = self.store.buckets(account).await?;
        let mut wanted = all.into_iter().filter(|b| b.name.starts_with(prefix) && b.name.as_str() > after).peekable();
        let page: Vec<_> = wanted.by_ref().take(limit).collect();
        let next = wanted.peek().and_then(|_| page.last().map(|bucket| bucket.name.clone()));
        let buckets = page
            .into_iter()
            .map(|bucket| Bucket {
                bucket_region: Some(self.region.clone()),
                creation_date: Some(timestamp(bucket.created_ns)),
                name: Some(bucket.name),
            })
            .collect();
        Ok(S3Response::new(ListBucketsOutput {
            buckets: Some(buckets),
            continuation_token: next,
            owner: Some(owner(account)),
            prefix: input.prefix.clone(),
        }))
    }

    pub(super) async fn get_bucket_location_(
        &self,
        request: S3Request<GetBucketLocationInput>,
    ) -> Reply<GetBucketLocationOutput> {
        self.store.bucket(account(&request)?, &request.input.bucket).await?;
        let location_constraint = Some(BucketLocationConstraint::from(self.region.clone()));
        Ok(S3Response::new(GetBucketLocationOutput { location_constraint }))
    }

    /// Versioning was never enabled: S3 answers with an empty document.
    pub(super) async fn get_bucket_versioning_(
        &self,
        request: S3Request<GetBucketVersioningInput>,
    ) -> Reply<GetBucketVersioningOutput> {
        self.store.bucket(account(&request)?, &request.input.bucket).await?;
        Ok(S3Response::new(GetBucketVersioningOutput::default()))
    }

    pub(super) async fn get_bucket_acl_(&self, request: S3Request<GetBucketAclInput>) -> Reply<GetBucketAclOutput> {
        let account = account(&request)?;
        self.store.bucket(account, &request.input.bucket).await?;
        Ok(S3Response::new(GetBucketAclOutput {
            grants: Some(vec![full_control(account)]),
            owner: Some(owner(account)),
        }))
    }
}

/// The one grant that everything here has: its account may do all.
pub(super) fn full_control(account: &str) -> Grant {
    let grantee = Grantee {
        display_name: Some(account.to_owned()),
        email_address: None,
        id: Some(account.to_owned()),
        type_: Type::from_static(Type::CANONICAL_USER),
        uri: None,
    };
    Grant { grantee: Some(grantee), permission: Some(Permission::from_static(Permission::FULL_CONTROL)) }
}
