-- A root volume's tags go with its instance. Until here they stayed when the instance was forgotten.
DELETE FROM tags WHERE resource_type = 'volume' AND resource_id NOT IN (SELECT volume_id FROM instances);

-- Set when a node was removed. Its row stays for as long as a terminated instance is shown that was on it.
ALTER TABLE nodes ADD COLUMN removed_ns INTEGER;
