-- Operators with roles, and what they do to accounts and models.

SELECT 1;
