"""What is segmented: volumes, data sets, preprocessing, the cache of prepared cases."""
