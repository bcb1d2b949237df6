// What the theme and docutils leave without a name or with a role that is no longer one, for those who hear the page.
document.addEventListener("DOMContentLoaded", () => {
  for (const opener of document.querySelectorAll(".bd-sidebar-primary summary")) opener.setAttribute("aria-label", "pages below");
  for (const entry of document.querySelectorAll("[role=doc-biblioentry]")) entry.setAttribute("role", "listitem");
});
