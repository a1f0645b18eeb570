"""Published data sets in their publishers' layouts, each as a raw log."""
