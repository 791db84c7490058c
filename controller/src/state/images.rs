//! Registered images: what to boot, by digest.

use std::collections::HashMap;

use sqlx::SqliteConnection;

use crate::clock;
use crate::error::Result;
use crate::ids::ImageId;

/// One row of `images`.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Image {
    pub id: ImageId,
    pub account_id: String,
    pub name: String,
    pub description: Option<String>,
    pub location: String,
    pub architecture: String,
    pub kernel_sha256: String,
    pub kernel_size: i64,
    pub initrd_sha256: Option<String>,
    pub initrd_size: Option<i64>,
    pub root_sha256: Option<String>,
    pub root_size: Option<i64>,
    pub cmdline: String,
    pub runs_on_software_kvm: bool,
    pub created_ns: i64,
    pub deregistered_ns: Option<i64>,
}

/// Bytes that an image names by digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub sha256: String,
    pub size: i64,
}

fn part(sha256: &Option<String>, size: Option<i64>) -> Option<Part> {
    Some(Part { sha256: sha256.clone()?, size: size? })
}

impl Image {
    pub fn kernel(&self) -> Part {
        Part { sha256: self.kernel_sha256.clone(), size: self.kernel_size }
    }

    pub fn initrd(&self) -> Option<Part> {
        part(&self.initrd_sha256, self.initrd_size)
    }

    pub fn root(&self) -> Option<Part> {
        part(&self.root_sha256, self.root_size)
    }

    pub fn digests(&self) -> Vec<String> {
        [Some(self.kernel()), self.initrd(), self.root()].into_iter().flatten().map(|part| part.sha256).collect()
    }
}

pub async fn insert(connection: &mut SqliteConnection, image: &Image) -> Result<()> {
    sqlx::query(
        "INSERT INTO images (id, account_id, name, description, location, architecture, kernel_sha256, kernel_size, \
         initrd_sha256, initrd_size, root_sha256, root_size, cmdline, runs_on_software_kvm, created_ns) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&image.id)
    .bind(&image.account_id)
    .bind(&image.name)
    .bind(&image.description)
    .bind(&image.location)
    .bind(&image.architecture)
    .bind(&image.kernel_sha256)
    .bind(image.kernel_size)
    .bind(&image.initrd_sha256)
    .bind(image.initrd_size)
    .bind(&image.root_sha256)
    .bind(image.root_size)
    .bind(&image.cmdline)
    .bind(image.runs_on_software_kvm)
    .bind(image.created_ns)
    .execute(connection)
    .await?;
    Ok(())
}

/// The account's images, deregistered ones left out.
pub async fn of_account(connection: &mut SqliteConnection, account: &str) -> Result<Vec<Image>> {
    Ok(sqlx::query_as("SELECT * FROM images WHERE account_id = ? AND deregistered_ns IS NULL ORDER BY id")
        .bind(account)
        .fetch_all(connection)
        .await?)
}

/// Also a deregistered one.
pub async fn find(connection: &mut SqliteConnection, account: &str, id: &ImageId) -> Result<Option<Image>> {
    Ok(sqlx::query_as("SELECT * FROM images WHERE account_id = ? AND id = ?")
        .bind(account)
        .bind(id)
        .fetch_optional(connection)
        .await?)
}

pub async fn by_name(connection: &mut SqliteConnection, account: &str, name: &str) -> Result<Option<Image>> {
    Ok(sqlx::query_as("SELECT * FROM images WHERE account_id = ? AND name = ? AND deregistered_ns IS NULL")
        .bind(account)
        .bind(name)
        .fetch_optional(connection)
        .await?)
}

/// Every image that an instance of the node boots from.
pub async fn on_node(connection: &mut SqliteConnection, node: &str) -> Result<HashMap<ImageId, Image>> {
    let rows: Vec<Image> = sqlx::query_as(
        "SELECT * FROM images WHERE id IN (SELECT image_id FROM instances WHERE node = ? AND state <> 'terminated')",
    )
    .bind(node)
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|image| (image.id.clone(), image)).collect())
}

pub async fn deregister(connection: &mut SqliteConnection, id: &ImageId) -> Result<()> {
    sqlx::query("UPDATE images SET deregistered_ns = ? WHERE id = ?")
        .bind(clock::now())
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// Forgets deregistered images that no instance boots from any more; their digests.
pub async fn forget_unused(connection: &mut SqliteConnection) -> Result<Vec<String>> {
    let unused: Vec<Image> = sqlx::query_as(
        "DELETE FROM images WHERE deregistered_ns IS NOT NULL \
         AND id NOT IN (SELECT image_id FROM instances) RETURNING *",
    )
    .fetch_all(connection)
    .await?;
    Ok(unused.iter().flat_map(Image::digests).collect())
}

/// Whether any image, also a deregistered one, still needs the blob.
pub async fn refer_to(connection: &mut SqliteConnection, sha256: &str) -> Result<bool> {
    let (count,): (i64,) =
        sqlx::query_as("SELECT count(*) FROM images WHERE ?1 IN (kernel_sha256, initrd_sha256, root_sha256)")
            .bind(sha256)
            .fetch_one(connection)
            .await?;
    Ok(count > 0)
}
