-- Usage summed up by the hour.

SELECT 1;
