-- Metered actions.

SELECT 1;
